"""Running averages against the sums that define them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from drawn import F64, classes, generator, rand, seeded
from torch import nn
from zoo import ZOO

import fxkfac
from fxkfac.errors import FxkfacError, MergeError, OptionError, UnknownParameter

CE = nn.CrossEntropyLoss


class Attention(nn.Module):
    """Query, key and value read one input; norms have exact diagonals."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(self.embed(x))
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return self.head(h).mT


def tokens(n, seed):
    return torch.randint(7, (n, 5), generator=generator(seed))


BATCHES = [(tokens(n, seed=n), classes(n, 5, seed=n)) for n in (3, 5, 2, 4)]


@pytest.fixture(scope="module")
def program():
    structure = {"head.bias": "dense"}
    return fxkfac.trace(seeded(Attention), BATCHES[0][0], structure=structure)


def factors_of(program, batch, **how):
    return fxkfac.kfac(program, CE(), batch, **how)


def corrected(decay, seen):
    """Σ_s (1 − β) β^{t−s} X_s / (1 − β^t), as it is defined."""
    t = len(seen)
    total = sum((1 - decay) * decay ** (t - 1 - s) * x for s, x in enumerate(seen))
    return total / (1 - decay**t)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def near(average, seen, seen_A, decay, decay_B):
    """Every A, B and exact block of an average, against those of the batches that it has seen."""
    for name, block in average.items():
        if isinstance(block, fxkfac.Diagonal):
            close(block.diagonal, corrected(decay_B, [f[name].diagonal for f in seen]))
        elif isinstance(block, fxkfac.Dense):
            close(block.matrix, corrected(decay_B, [f[name].matrix for f in seen]))
        else:
            close(block.A, corrected(decay, [f[name].A for f in seen_A]))
            close(block.B, corrected(decay_B, [f[name].B for f in seen]))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("decay_B", [None, 0.3])
def test_the_mean_with_the_weights_that_define_it(program, sharing, decay_B):
    average, seen = fxkfac.RunningAverage(0.8, decay_B), []
    for batch in BATCHES:
        seen.append(factors_of(program, batch, sharing=sharing))
        average.update(seen[-1])
        near(average, seen, seen, 0.8, decay_B or 0.8)
    kinds = {type(block) for block in average.values()}
    assert kinds == {fxkfac.Block, fxkfac.Diagonal, fxkfac.Dense}
    assert list(average) == list(seen[0])
    assert average.shapes == seen[0].shapes


def test_the_first_update_is_what_it_was_given(program):
    average, first = fxkfac.RunningAverage(0.95), factors_of(program, BATCHES[0])
    average.update(first)
    assert torch.equal(average.dense(), first.dense())
    assert average["q.weight"].A.data_ptr() != first["q.weight"].A.data_ptr()


def test_it_prints_what_it_averages(program):
    average = fxkfac.RunningAverage(0.9, decay_B=0.5)
    assert repr(average) == "RunningAverage(nothing yet; decay=0.9, decay_B=0.5)"
    average.update(factors_of(program, BATCHES[0]))
    expected = f"{len(average)} blocks, update 1 of A; decay=0.9, decay_B=0.5"
    assert repr(average) == f"RunningAverage({expected})"


def test_the_two_at_intervals_of_their_own(program):
    average, seen, seen_A = fxkfac.RunningAverage(0.7, 0.9), [], []
    for number, batch in enumerate(BATCHES * 2):
        found = factors_of(program, batch)
        if number % 3 == 0:
            seen_A.append(found)
        seen.append(found)
        average.update(found, "AB" if number % 3 == 0 else "B")
    near(average, seen, seen_A, 0.7, 0.9)
    before = [factors_of(program, b) for b in BATCHES]
    for found in before:
        average.update(found, "A")
    near(average, seen, seen_A + before, 0.7, 0.9)


def test_in_place_and_one_factor_for_equal_inputs(program):
    average = fxkfac.RunningAverage(0.9)
    average.update(factors_of(program, BATCHES[0]))
    places = [average[n].A.data_ptr() for n in ("q.weight", "k.weight", "v.weight")]
    assert len(set(places)) == 1
    average.update(factors_of(program, BATCHES[1]))
    assert average["k.weight"].A.data_ptr() == places[0]


def test_a_copy_stays(program):
    average = fxkfac.RunningAverage(0.9)
    average.update(factors_of(program, BATCHES[0]))
    one, all_of_them = copy.deepcopy(average["q.weight"]), copy.deepcopy(average)
    before = average["q.weight"].A.clone()
    average.update(factors_of(program, BATCHES[1]))
    assert not torch.equal(average["q.weight"].A, before)
    assert torch.equal(one.A, before)
    assert torch.equal(all_of_them["q.weight"].A, before)


def test_equal_inputs_that_part_where_targets_are_ignored(program):
    """Then every A is that of the rows at which a gradient arrives."""
    x, y = BATCHES[0]
    ignored = y.clone()
    ignored[:, 3:] = -100
    seen = [factors_of(program, (x, y)), factors_of(program, (x, ignored))]
    assert seen[1]["q.weight"].A is not seen[1]["k.weight"].A
    average = fxkfac.RunningAverage(0.6)
    for found in [*seen, seen[0]]:
        average.update(found)
    near(average, [*seen, seen[0]], [*seen, seen[0]], 0.6, 0.6)


def routed(params, x, choice):
    return torch.einsum("nio,ni->no", params["W"][choice], x)


def test_a_group_that_no_row_has_chosen_keeps_its_output_factor():
    params, x, y = {"W": rand(3, 4, 2)}, rand(5, 4), rand(5, 2)
    choices = [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 2, 2], [1, 1, 1, 1, 1]]
    program = fxkfac.trace(routed, (x, torch.tensor(choices[0])), params)
    average, seen = fxkfac.RunningAverage(0.8), []
    for choice in choices:
        seen.append(
            fxkfac.kfac(program, nn.MSELoss(), ((x, torch.tensor(choice)), y), fisher="empirical")
        )
        average.update(seen[-1])
    close(average["W"].A, corrected(0.8, [f["W"].A for f in seen]))
    for group in range(3):
        chosen = [f["W"].B[group] for f, c in zip(seen, choices, strict=True) if group in c]
        close(average["W"].B[group], corrected(0.8, chosen))


@pytest.mark.parametrize("name", ["tied_autoencoder", "conv_groups", "bmm_experts"])
def test_sums_of_products_and_groups(name):
    entry = ZOO[name]
    program = entry.trace(*entry.build(), 4)
    data = entry.data(6)
    seen = [
        fxkfac.kfac(program, entry.loss, entry.take(data, index))
        for index in ([0, 1], [2, 3, 4], [5, 0])
    ]
    average = fxkfac.RunningAverage(0.5)
    for found in seen:
        average.update(found)
    for block, *blocks in zip(average, *seen, strict=True):
        terms = zip(
            average[block].terms,
            *(f[b].terms for f, b in zip(seen, blocks, strict=True)),
            strict=True,
        )
        for mine, *theirs in terms:
            close(mine.A, corrected(0.5, [t.A for t in theirs]))
            close(mine.B, corrected(0.5, [t.B for t in theirs]))


def test_it_is_a_curvature(program):
    average, seen = fxkfac.RunningAverage(0.9), [factors_of(program, b) for b in BATCHES[:2]]
    for found in seen:
        average.update(found)
    gradients = {name: rand(*shape) for name, shape in average.shapes.items()}
    solved = average.solve(gradients, damping=0.1)
    flat = torch.cat([g.flatten() for g in gradients.values()])
    expected = average.dense() + 0.1 * torch.eye(len(flat), dtype=F64)
    close_to = torch.cat([s.flatten() for s in solved.values()])
    torch.testing.assert_close(expected @ close_to, flat)


def test_half_precision_is_averaged_in_float32():
    model, x, y = seeded(lambda: nn.Linear(4, 3)).bfloat16(), rand(5, 4).bfloat16(), classes(5)
    found = fxkfac.kfac(fxkfac.trace(model, x), CE(), (x, y))
    average = fxkfac.RunningAverage()
    average.update(found)
    assert average["weight"].A.dtype == average["weight"].B.dtype == torch.float32


def test_what_is_refused(program):
    found = factors_of(program, BATCHES[0])
    with pytest.raises(OptionError, match=r"decay=1.0; expected a number in \[0, 1\)"):
        fxkfac.RunningAverage(1.0)
    with pytest.raises(OptionError, match=r"decay_B=-0.1"):
        fxkfac.RunningAverage(0.9, -0.1)
    average = fxkfac.RunningAverage()
    assert len(average) == 0
    assert list(average) == []
    with pytest.raises(UnknownParameter):
        average["q.weight"]
    with pytest.raises(FxkfacError, match="nothing to average yet"):
        average.dense()
    with pytest.raises(OptionError, match="parts='A' in the first update"):
        average.update(found, "A")
    with pytest.raises(OptionError, match="parts='BA'"):
        average.update(found, "BA")
    average.update(found)
    before = average.dense()
    with pytest.raises(MergeError, match=r"sharing='reduce'"):
        average.update(factors_of(program, BATCHES[0], sharing="reduce"))
    assert torch.equal(average.dense(), before)
