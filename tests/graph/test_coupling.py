"""Data that are alike tell nothing in any order: what is found all the same, and what is not."""

from __future__ import annotations

import pytest
import torch
from drawn import classes, rand, seeded
from torch import nn
from zoo import Made

import fxkfac
from fxkfac.errors import BatchAxisError
from fxkfac.graph.experiments.coupling import separating_sets

MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
N = 5


def embedded(*more):
    """A model of tokens; `more` comes behind the first linear layer."""

    def make():
        head = nn.Tanh(), nn.Linear(3, 3)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), *more, *head)

    return seeded(make)


def centred(z):
    return z - z.mean(0)


# --- one datum's prediction and the others ---

TOKENS = {
    "first as last": torch.tensor([0, 1, 0, 1]),
    "one unlike the others": torch.tensor([3, 3, 3, 3, 3, 5]),
    "two": torch.tensor([0, 1]),
    "all the same": torch.zeros(4, dtype=torch.long),
}


@pytest.mark.parametrize("example", TOKENS.values(), ids=TOKENS)
def test_batch_norm_of_tokens(example):
    model = embedded(nn.BatchNorm1d(3, affine=False)).train()
    program = fxkfac.trace(model, example, structure={"1.weight": "diagonal"})
    assert program.tapped.coupled
    data = torch.tensor([0, 6, 3, 3, 1]), classes(N)
    with pytest.raises(BatchAxisError, match="by itself"):
        fxkfac.kfac(program, CE, data)


def assert_refused(program, data, why):
    """Whatever needs one datum's own gradient."""
    factors = fxkfac.kfac(program, CE, data)
    for function in (fxkfac.ekfac, fxkfac.kfoc):
        with pytest.raises(BatchAxisError, match=why):
            function(program, CE, data, factors)
    with pytest.raises(BatchAxisError, match=why):
        fxkfac.influence(program, CE, factors, data, data, 0.1)


def test_what_batch_norm_of_equal_tokens_forbids():
    plain = fxkfac.trace(embedded(nn.BatchNorm1d(3, affine=False)).train(), TOKENS["all the same"])
    data = torch.tensor([0, 6, 3, 3, 1]), classes(N)
    assert_refused(plain, data, "depends on the others'")


@pytest.mark.parametrize("example", TOKENS.values(), ids=TOKENS)
def test_tokens_that_know_nothing_of_each_other(example):
    model = embedded()
    program = fxkfac.trace(model, example, structure={"1.weight": "diagonal"})
    assert not program.tapped.coupled
    assert not program.tapped.alike
    data = torch.tensor([0, 6, 3, 3, 1]), classes(N)
    factors = fxkfac.kfac(program, CE, data)
    expected = fxkfac.exact.ggn(model, CE, data, "1.weight").diagonal()
    torch.testing.assert_close(factors.dense("1.weight").diagonal(), expected)
    fxkfac.ekfac(program, CE, data, factors)


MET = {
    "largest of all": lambda z: z / z.abs().max(),
    "last": lambda z: z.tanh() * z.tanh()[-1:],
    "third before": lambda z: z.tanh() * z.tanh().roll(3, 0),
    "those behind the fourth": lambda z: z.tanh() + z.tanh()[4:].sum(0),
}


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize("meet", MET.values(), ids=MET)
def test_whichever_datum_the_others_depend_on(meet, seed):
    def forward(m, x):
        return m.out(meet(m.inside(x)))

    model = seeded(lambda: Made(forward, inside=nn.Linear(3, 4), out=nn.Linear(4, 2)))
    program = fxkfac.trace(model, rand(8, 3, seed=seed), structure={"inside.weight": "dense"})
    assert program.tapped.coupled
    with pytest.raises(BatchAxisError, match="by itself"):
        fxkfac.kfac(program, MSE, (rand(8, 3), rand(8, 2)))


def test_of_any_two_data_each_is_once_changed_while_the_other_is_not():
    for n in (2, 3, 4, 10, 11, 40):
        held_by = torch.stack(list(separating_sets(n)))
        apart = (held_by[:, :, None] & ~held_by[:, None, :]).any(0)
        assert torch.equal(apart, ~torch.eye(n, dtype=torch.bool))


def of_ids(m, t):
    return centred(m.linear(m.table(t.long())))


FEATURES = {
    "rows of the same positions": (torch.arange(6).repeat(4, 1), (6, 4)),
    "numbers that stand for ids": (torch.tensor([0.0, 1.0, 0.0, 1.0]), (6, 4)),
    "one such number": (torch.ones(4), (6, 4)),
    "bool": (torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]]).bool(), (6, 4)),
    "zeros and ones": (torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]), (6, 4)),
}


@pytest.mark.parametrize(("example", "size"), FEATURES.values(), ids=FEATURES)
def test_features_without_numbers_near_by(example, size):
    def make():
        return Made(of_ids, table=nn.Embedding(*size), linear=nn.Linear(4, 3))

    assert fxkfac.trace(seeded(make), example).tapped.coupled


def test_a_zero_head_hides_nothing():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    assert fxkfac.trace(model.double().train(), rand(N, 4)).tapped.coupled
    assert not fxkfac.trace(model.eval(), rand(N, 4)).tapped.coupled
    assert not model[2].weight.any()


def test_where_tokens_meet_no_tap_before_the_others():
    """Of a frozen table all is the same, and whether what follows mixes the data does not show."""
    model = embedded(nn.GroupNorm(1, 3))
    alike, data = torch.zeros(4, dtype=torch.long), (torch.tensor([0, 6, 3, 3, 1]), classes(N))
    wanted = ["2.*", "4.*"]
    program = fxkfac.trace(model, alike, wanted, structure={"4.*": "dense"})
    assert program.tapped.alike
    assert not program.tapped.coupled
    row = {r.parameter: r for r in program.coverage()}["2.weight"]
    assert "do not tell" in row.reason
    factors = fxkfac.kfac(program, CE, data)  # the data themselves are looked at
    for name in ("2.weight", "4.weight"):
        expected = fxkfac.exact.ggn(model, CE, data, name)
        found = factors.dense(name)
        torch.testing.assert_close(found.diagonal(), expected.diagonal())
    plain = fxkfac.trace(model, alike, wanted)
    assert_refused(plain, data, "data that differ")
    assert not fxkfac.trace(model, data[0], wanted).tapped.alike


def test_a_mask_of_ones_is_no_such_thing():
    def masked(m, x, mask):
        return m.out((m.inside(x).tanh() * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))

    model = seeded(lambda: Made(masked, inside=nn.Linear(4, 3), out=nn.Linear(3, 2)))
    program = fxkfac.trace(model, (rand(4, 6, 4), torch.ones(4, 6, dtype=torch.long)))
    assert not program.tapped.coupled
    assert not program.tapped.alike


# --- where the data are ---


def tokens_first(m, t):
    return m.linear(m.table(t))


def in_one_row(m, t):
    return m.linear(m.table(t)).tanh().flatten(0, 1)


def tagger(forward):
    parts = {"table": nn.Embedding(7, 4), "linear": nn.Linear(4, 3)}
    return seeded(lambda: Made(forward, **parts))


@pytest.mark.parametrize("time", [4, 6])
@pytest.mark.parametrize("axis", [0, 1])
def test_equal_tokens_leave_no_doubt_of_an_axis_of_its_own(axis, time):
    model = tagger(tokens_first)
    shape = (time, 4) if axis else (4, time)
    program = fxkfac.trace(
        model,
        torch.zeros(shape, dtype=torch.long),
        batch_axis=axis,
        structure={"linear.weight": "dense"},
    )
    assert program.tapped.prediction == (axis, 1, 1)
    assert {(u.batch.outer, u.batch.inner) for u in program.uses} == {(1, 1)}
    t = torch.arange(6 * N).view(6, N).remainder(7) if axis else torch.arange(30).view(N, 6) % 7
    data = t, rand(*t.shape, 3)
    expected = fxkfac.exact.ggn(model, MSE, data, "linear.weight")
    torch.testing.assert_close(fxkfac.kfac(program, MSE, data).dense("linear.weight"), expected)


def test_equal_tokens_in_one_row_are_refused():
    model = tagger(in_one_row)
    with pytest.raises(BatchAxisError, match=r"axis 0 as 1·N·6 or .* 6·N·1; .*that differ"):
        fxkfac.trace(model, torch.zeros(4, 6, dtype=torch.long))
    tokens = torch.arange(24).view(4, 6) % 7
    assert fxkfac.trace(model, tokens).tapped.prediction == (0, 1, 6)
    assert fxkfac.trace(model, tokens.T, batch_axis=1).tapped.prediction == (0, 6, 1)


def test_a_prediction_of_zeros_tells_its_layout():
    model = tagger(in_one_row)
    nn.init.zeros_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    tokens = torch.arange(24).view(6, 4) % 7
    assert fxkfac.trace(model, tokens, batch_axis=1).tapped.prediction == (0, 6, 1)


# --- a batch of one ---


def squeezed(m, x):
    return m.out(m.inside(x).squeeze().tanh()).reshape(x.shape[0], -1)


@pytest.mark.parametrize("traced", [1, 4])
def test_a_batch_of_one_that_loses_its_axis(traced):
    model = seeded(lambda: Made(squeezed, inside=nn.Linear(4, 5), out=nn.Linear(5, 3)))
    program = fxkfac.trace(model, rand(traced, 1, 4))
    data = rand(1, 1, 4, seed=1), rand(1, 3, seed=2)
    for sharing in ("expand", "reduce"):
        factors = fxkfac.kfac(program, MSE, data, sharing=sharing)
        for layer in ("inside", "out"):
            names = [f"{layer}.weight", f"{layer}.bias"]
            expected = fxkfac.exact.ggn(model, MSE, data, names)
            torch.testing.assert_close(factors.dense(*names), expected)
    assert max(fxkfac.check(program, MSE, data).values()) < 1e-12
    more = rand(3, 1, 4), rand(3, 3)
    assert fxkfac.kfac(program, MSE, [data, more]).n == 4
