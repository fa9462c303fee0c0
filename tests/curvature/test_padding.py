"""Rows that the user's mask says are padding count for nothing."""

import pytest
import torch
from drawn import classes, rand, seeded
from quick import quick
from torch import nn

import fxkfac
from fxkfac.errors import DataError

N, T = 4, 5
REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()


class Tagger(nn.Module):
    """Every position by itself: tokens in, classes out, the classes on axis 1."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.table(tokens)))).movedim(-1, 1)


@pytest.fixture(scope="module")
def data():
    tokens, labels = classes(N, T, C=7), classes(N, T, seed=2)
    return tokens, torch.where(REAL, labels, -100)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_expand_is_that_of_the_real_rows_alone(data, fisher):
    tokens, labels = data
    model, loss = seeded(Tagger), nn.CrossEntropyLoss()
    found = fxkfac.kfac(
        fxkfac.trace(model, tokens), loss, data, fisher=fisher, mask=lambda x, y: y != -100
    )
    rows = tokens[REAL].unsqueeze(1), labels[REAL].unsqueeze(1)
    expected = fxkfac.kfac(fxkfac.trace(model, rows[0]), loss, rows, fisher=fisher)
    for name, block in expected.items():
        torch.testing.assert_close(found[name].A, block.A)
        torch.testing.assert_close(found[name].B, block.B)


def test_reduce_is_that_of_shorter_data(data):
    """Each datum cut to its real rows; one without any is none."""
    model, loss = seeded(Tagger), nn.CrossEntropyLoss(reduction="sum")
    tokens, labels = data
    found = fxkfac.kfac(
        fxkfac.trace(model, tokens), loss, data, sharing="reduce", mask=lambda x, y: y != -100
    )
    program = fxkfac.trace(model, tokens)
    singles = [
        fxkfac.kfac(program, loss, (t[m][None], y[m][None]), sharing="reduce")
        for t, y, m in zip(tokens, labels, REAL, strict=True)
        if m.any()
    ]
    expected = singles[0] + singles[1] + singles[2]
    for name, block in expected.items():
        torch.testing.assert_close(found[name].A, block.A)
        torch.testing.assert_close(found[name].B, block.B)


def test_mask_by_keyword_and_pooled_rows(data):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, tokens, attention_mask):
            h = self.table(tokens) * attention_mask.unsqueeze(-1)
            return self.head(h.sum(1))

    model, inputs = seeded(Pooled), {"tokens": data[0], "attention_mask": REAL.double()}
    program = fxkfac.trace(model, inputs)
    pair = inputs, classes(N)
    plain = fxkfac.kfac(program, nn.CrossEntropyLoss(), pair)
    found = fxkfac.kfac(program, nn.CrossEntropyLoss(), pair, mask="attention_mask")
    torch.testing.assert_close(found["head.weight"].B, plain["head.weight"].B)
    counts = data[0][REAL].bincount(minlength=7) / N
    torch.testing.assert_close(found["table.weight"].A, counts.double())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("mask", [None, lambda x, y: y != -100])
def test_a_position_may_have_several_rows(data, mask, sharing):
    """As one for each head of a weight that heads share."""

    def model(params, x):  # (data, positions, heads, entries)
        return (torch.tanh(x @ params["W"]).sum(2) @ params["V"]).movedim(-1, 1)

    params = {"W": rand(3, 4), "V": rand(4, 3)}
    x, labels, loss = rand(N, T, 2, 3), data[1], nn.CrossEntropyLoss(reduction="sum")
    program = fxkfac.trace(model, x, params)
    found = fxkfac.kfac(program, loss, (x, labels), mask=mask, sharing=sharing)
    singles = [
        fxkfac.kfac(program, loss, (x[n, m][None], labels[n, m][None]), sharing=sharing)
        for n, m in enumerate(REAL[:3])
    ]
    expected = singles[0] + singles[1] + singles[2]
    for name, block in expected.items():
        torch.testing.assert_close(found[name].A, block.A)
        torch.testing.assert_close(found[name].B, block.B)


def test_masks_that_do_not_fit(data):
    program = fxkfac.trace(seeded(Tagger), data[0])
    loss = nn.CrossEntropyLoss()
    for mask, says in [
        ("attention_mask", "no input has this keyword"),
        (lambda x, y: y[:, 0] > 0, r"expected a tensor \(N, T\)"),
        (lambda x, y: rand(N, 3) > 0, "no use has rows like"),
    ]:
        with pytest.raises(DataError, match=says):
            fxkfac.kfac(program, loss, data, mask=mask)


class Causal(nn.Module):
    """A language model of one block: no position sees a later one."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv = nn.Embedding(7, 4), nn.Linear(4, 12)
        self.mlp, self.head = nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        h = self.table(tokens)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + torch.tanh(self.mlp(h))).movedim(-1, 1)


LENGTHS = (3, 5, 2, 4)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", quick(["type-2", "empirical"], "type-2".__eq__))
def test_rows_that_no_loss_term_can_see_follow_from_ignore_index(fisher, sharing):
    """Padded behind, with a first token that has no target: as if each datum had its own length."""
    tokens, labels = classes(N, T, C=7), classes(N, T, C=7, seed=2)
    labels[:, 0] = -100  # all other positions see the first one
    for n, length in enumerate(LENGTHS):
        labels[n, length:] = -100
    model, loss = seeded(Causal), nn.CrossEntropyLoss(reduction="sum")
    program = fxkfac.trace(model, tokens)
    found = fxkfac.kfac(program, loss, (tokens, labels), fisher=fisher, sharing=sharing)
    singles = [
        fxkfac.kfac(program, loss, (t[None, :m], y[None, :m]), fisher=fisher, sharing=sharing)
        for t, y, m in zip(tokens, labels, LENGTHS, strict=True)
    ]
    expected = singles[0] + singles[1] + singles[2] + singles[3]
    for name, block in expected.items():
        torch.testing.assert_close(found[name].A, block.A)
        torch.testing.assert_close(found[name].B, block.B)


def test_the_same_for_a_loss_over_flat_positions():
    tokens, labels = classes(N, T, C=7), classes(N, T, C=7, seed=2)
    labels[:, 3:] = -100
    model, loss = seeded(Causal), nn.CrossEntropyLoss()
    plain = fxkfac.kfac(fxkfac.trace(model, tokens), loss, (tokens, labels))

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens).movedim(1, -1).flatten(0, 1)

    flat = fxkfac.trace(Flat(), tokens)
    found = fxkfac.kfac(flat, loss, (tokens, labels.flatten()))
    for name, block in plain.items():
        torch.testing.assert_close(found[f"model.{name}"].A, block.A)
        torch.testing.assert_close(found[f"model.{name}"].B, block.B)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_forward_only_leaves_out_what_the_others_do(sharing):
    """Though it sends nothing back that would tell."""
    tokens, labels = classes(N, T, C=7), classes(N, T, C=7, seed=2)
    labels[:, 0] = -100  # all other positions see the first one
    for n, length in enumerate(LENGTHS):
        labels[n, length:] = -100
    program, loss = fxkfac.trace(seeded(Causal), tokens), nn.CrossEntropyLoss()
    options = {"sharing": sharing}
    found = fxkfac.kfac(program, loss, (tokens, labels), fisher="forward-only", **options)
    expected = fxkfac.kfac(program, loss, (tokens, labels), fisher="type-2", **options)
    for name, block in expected.items():
        torch.testing.assert_close(found[name].A, block.A)
        assert found[name].B.equal(torch.eye(len(block.B)).to(block.B))


class Experts(nn.Module):
    """Both experts take every token, in the order of slots, then of tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))

    def forward(self, x, mask):
        rows = x.reshape(-1, 4)
        weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        out = rows.new_zeros(len(rows), 3)
        for k, expert in enumerate(self.experts):
            slot, token = torch.where((chosen == k).T)
            out = out.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.view(*x.shape[:2], 3).movedim(-1, 1)


@pytest.mark.parametrize("mask", ["mask", None])
def test_rows_of_experts_are_no_positions_even_if_as_many(mask):
    model, x, labels = seeded(Experts), rand(N, T, 4), torch.where(REAL, classes(N, T, C=3), -100)
    program = fxkfac.trace(model, {"x": x, "mask": REAL})
    batches = [({"x": x[i : i + 1], "mask": REAL[i : i + 1]}, labels[i : i + 1]) for i in range(3)]
    whole = {"x": x[:3], "mask": REAL[:3]}, labels[:3]
    found, expected = (
        fxkfac.kfac(program, nn.CrossEntropyLoss(), data, fisher="empirical", mask=mask)
        for data in (batches, whole)
    )
    for name in ("experts.0.weight", "experts.1.weight"):
        torch.testing.assert_close(found[name].A, expected[name].A)
        torch.testing.assert_close(found[name].B, expected[name].B)
