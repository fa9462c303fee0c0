"""Models in which the data's values say where each datum is: found anew for every batch."""

import pytest
import torch
from torch import nn

import fxkfac
from fxkfac.errors import BatchAxisError
from fxkfac.graph.experiments.by_values import is_by_values

F64 = torch.float64
LOSS = nn.CrossEntropyLoss()


class Masked(nn.Module):
    """Predicts the tokens at the positions that a mask chooses."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(8, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)
        self.head = nn.Linear(4, 8, dtype=F64)

    def forward(self, tokens, mask):
        x = self.table(tokens)
        x = torch.tanh(self.layer(x + x.mean(1, keepdim=True)))
        return self.head(x[mask])


class Experts(nn.Module):
    """Two layers, each of which sees the tokens that their own values send to it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, dtype=F64), nn.Linear(4, 3, dtype=F64)

    def forward(self, x):
        rows = x.flatten(0, 1)
        to_a, to_b = torch.where(rows[:, 0] > 0)[0], torch.where(rows[:, 0] <= 0)[0]
        y = rows.new_zeros(len(rows), 3)
        y = y.index_add(0, to_a, self.a(rows[to_a])).index_add(0, to_b, self.b(rows[to_b]))
        return y.view(len(x), -1, 3).sum(1)


class Sorted(nn.Module):
    """Works on its data in the order of their lengths."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4, dtype=F64), nn.Linear(4, 5, dtype=F64)
        self.head = nn.Linear(5, 3, dtype=F64)

    def forward(self, tokens, lengths):
        order = lengths.argsort(descending=True, stable=True)
        x = torch.tanh(self.layer(self.table(tokens[order])))
        real = (torch.arange(tokens.shape[1]) < lengths[order].unsqueeze(1)).to(x).unsqueeze(-1)
        return self.head((x * real).sum(1) / real.sum(1))[order.argsort()]


class LastToken(nn.Module):
    """Reads one position of each datum: values choose, but not among the data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=F64)

    def forward(self, x, lengths):
        return self.layer(x)[torch.arange(x.shape[0]), lengths - 1]


def masked(rows):
    mask = torch.zeros(len(rows), 5, dtype=torch.bool)
    for datum, chosen in enumerate(rows):
        mask[datum, chosen] = True
    return torch.randint(0, 8, (len(rows), 5)), mask


def routed(to_a):
    x = torch.randn(*to_a.shape, 4, dtype=F64)
    x[..., 0] = x[..., 0].abs() * (2 * to_a - 1)
    return x


EVEN = torch.tensor([[1, 0, 0]] * 4)
UNEVEN = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
TOKENS = torch.arange(24).view(4, 6) % 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def influence_by_hand(model, factors, inputs, targets, parameters):
    total = nn.CrossEntropyLoss(reduction="sum")
    rows = []
    for k in range(len(targets)):
        prediction = model(*(x[k : k + 1] for x in inputs))
        found = torch.autograd.grad(total(prediction, targets[k : k + 1]), parameters.values())
        rows.append(torch.cat([g.flatten() for g in found]))
    G, D = torch.stack(rows), factors.dense(*parameters)
    return -G @ torch.linalg.solve(D + 1e-2 * torch.eye(len(D), dtype=F64), G.mT)


def outputs_of(model, layer, inputs):
    """The prediction, and the output of one layer on the way."""
    heard = []
    hook = layer.register_forward_hook(lambda module, x, y: heard.append(y))
    prediction = model(*inputs)
    hook.remove()
    return prediction, heard[0]


def type2_by_hand(model, layer, inputs):
    """B of a layer: every site and class by itself."""
    prediction, y = outputs_of(model, layer, inputs)
    p, total = prediction.softmax(-1).detach(), 0.0
    for site, q in enumerate(p):
        for root in (q.sqrt().diag() - torch.outer(q, q.sqrt())).unbind(1):
            vector = torch.zeros_like(p)
            vector[site] = root
            (g,) = torch.autograd.grad(prediction, y, vector, retain_graph=True)
            total = total + g.flatten(0, -2).mT @ g.flatten(0, -2)
    return total / y.shape[:-1].numel()


class TestMasked:
    @pytest.mark.parametrize(
        "rows", [[[0, 1], [1, 4], [2, 3]], [[0, 1, 2], [1, 3, 4], [0, 2, 3]], [[4], [1], [0]]]
    )
    def test_as_many_rows_of_each_datum(self, rows):
        model = Masked()
        program = fxkfac.trace(model, masked([[0, 2], [1, 3], [2, 4]]))
        inputs = masked(rows)
        factors = fxkfac.kfac(program, LOSS, (inputs, torch.arange(3 * len(rows[0])) % 8))
        assert program.at(inputs)[0].prediction == (0, 1, len(rows[0]))
        expected = type2_by_hand(model, model.table, inputs)
        assert torch.allclose(factors["table.weight"].B, expected, rtol=1e-10)

    @pytest.mark.parametrize("rows", [[[0], [1, 2, 3], [2, 4], [0, 1]], [[0], [1], [2, 4], [0]]])
    def test_uneven_rows_have_no_axis(self, rows):
        program = fxkfac.trace(Masked(), masked([[0, 2], [1, 3], [2, 4], [0, 1]]))
        data = masked(rows), torch.arange(sum(map(len, rows)))
        with pytest.raises(BatchAxisError, match="no one axis of the prediction"):
            fxkfac.kfac(program, LOSS, data)
        assert max(fxkfac.check(program, LOSS, data).values()) < 1e-12

    def test_uneven_rows_of_the_example(self):
        inputs = masked([[0], [1, 2, 3], [2, 4], [0, 1]])
        program = fxkfac.trace(Masked(), inputs)
        assert program.at(inputs)[0].prediction is None

    def test_flavours_that_need_no_axis(self):
        model = Masked()
        program = fxkfac.trace(model, masked([[0, 2], [1, 3], [2, 4], [0, 1]]))
        inputs, targets = masked([[0], [1, 2, 3], [2, 4], [0, 1]]), torch.arange(8)
        factors = fxkfac.kfac(program, LOSS, (inputs, targets), fisher="empirical")
        prediction, y = outputs_of(model, model.table, inputs)
        (g,) = torch.autograd.grad(8 * LOSS(prediction, targets), y)
        expected = g.flatten(0, 1).mT @ g.flatten(0, 1) / 20
        assert torch.allclose(factors["table.weight"].B, expected, rtol=1e-10)


class TestExperts:
    def test_influence(self):
        model = Experts()
        program = fxkfac.trace(model, routed(EVEN), params=["a.*"])
        x, y = routed(UNEVEN), torch.randint(0, 3, (4,))
        factors = fxkfac.kfac(program, LOSS, (x, y))
        with pytest.raises(BatchAxisError, match="no one axis of its output"):
            fxkfac.influence(program, LOSS, factors, (x, y), (x, y), 1e-2)

    def test_influence_of_even_rows(self):
        model = Experts()
        program = fxkfac.trace(model, routed(EVEN), params=["a.*"])
        x, y = routed(EVEN.roll(1, 1)), torch.randint(0, 3, (4,))
        factors = fxkfac.kfac(program, LOSS, (x, y))
        found = fxkfac.influence(program, LOSS, factors, (x, y), (x, y), 1e-2)
        parameters = {"a.weight": model.a.weight, "a.bias": model.a.bias}
        expected = influence_by_hand(model, factors, (x,), y, parameters)
        assert torch.allclose(found, expected, rtol=1e-10)

    @pytest.mark.parametrize("structure", ["diagonal", "dense"])
    def test_exact_blocks_of_uneven_rows(self, structure):
        model, data = Experts(), (routed(UNEVEN), torch.randint(0, 3, (4,)))
        program = fxkfac.trace(model, routed(EVEN), structure={"*": structure})
        fxkfac.kfac(program, LOSS, (routed(EVEN), data[1]))
        found = fxkfac.kfac(program, LOSS, data).dense("a.weight")
        expected = fxkfac.exact.ggn(model, LOSS, data, "a.weight")
        if structure == "diagonal":
            expected = expected.diagonal().diag()
        assert torch.allclose(found, expected, rtol=1e-10)


class TestSorted:
    def test_order(self):
        model, lengths, y = Sorted(), torch.tensor([2, 5, 6, 3]), torch.tensor([0, 2, 1, 1])
        program = fxkfac.trace(model, (TOKENS, torch.full((4,), 6)))
        data = (TOKENS, lengths), y
        factors = fxkfac.kfac(program, LOSS, data)
        assert program.at((TOKENS, lengths))[0].prediction == (0, 1, 1)
        with pytest.raises(BatchAxisError, match="no one axis of its output"):
            fxkfac.influence(program, LOSS, factors, data, data, 1e-2)

    def test_an_order_that_is_the_datas(self):
        model, lengths, y = Sorted(), torch.tensor([6, 6, 6, 6]), torch.tensor([0, 2, 1, 1])
        program = fxkfac.trace(model, (TOKENS, torch.full((4,), 6)))
        data = (TOKENS.roll(1, 0), lengths), y
        factors = fxkfac.kfac(program, LOSS, data)
        found = fxkfac.influence(program, LOSS, factors, data, data, 1e-2)
        parameters = dict(model.named_parameters())
        expected = influence_by_hand(model, factors, data[0], y, parameters)
        assert torch.allclose(found, expected, rtol=1e-10)


# What k, of shape (4,), says of x: whether that moves data about.
OPS = {
    "rows": (lambda x, k: x[k], True),
    "columns": (lambda x, k: x.gather(1, k.unsqueeze(1) % 3), False),
    "each": (lambda x, k: x[torch.arange(x.shape[0]), k % 3].unsqueeze(1), False),
    "look_up": (lambda x, k: nn.functional.embedding(k, x), True),
    "table": (lambda x, k: x + torch.eye(4, 3, dtype=F64)[k], False),
    "added": (lambda x, k: torch.zeros_like(x).index_add(0, k, x), True),
    "put": (lambda x, k: torch.zeros_like(x).index_put((k,), x), True),
    "scattered": (lambda x, k: x.masked_scatter(k.unsqueeze(1) > 1, 2 * x), True),
    "filled": (lambda x, k: x.masked_fill(k.unsqueeze(1) > 1, 0.0), False),
    "sorted": (lambda x, k: x.sort(0).values, True),
    "sorted_columns": (lambda x, k: x.sort(1).values, False),
}


@pytest.mark.parametrize("name", OPS)
def test_what_moves_data_about(name):
    op, moves = OPS[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3, dtype=F64)

        def forward(self, x, k):
            return op(self.layer(x), k)

    program = fxkfac.trace(Model(), (torch.randn(4, 5, dtype=F64), torch.tensor([3, 0, 2, 1])))
    assert program.tapped.by_values == moves


def test_which_models_are_looked_at_again():
    x = torch.randn(4, 5, 4, dtype=F64)
    last = fxkfac.trace(LastToken(), (x, torch.tensor([5, 2, 3, 1])))
    assert not last.tapped.by_values
    assert not fxkfac.trace(nn.Linear(4, 3, dtype=F64), x).tapped.by_values
    assert fxkfac.trace(Experts(), routed(EVEN)).tapped.by_values
    captured = last.tapped.captured
    assert not is_by_values(captured.module.graph, captured.inputs())
