"""Inputs and parameters that lack axes: unit axes, shared axes, none at all; small gradients."""

import pytest
import torch
from drawn import F64, rand, seeded
from torch import nn

import fxkfac
from fxkfac.graph.deviation import gradient_errors


class Embedded(nn.Module):
    """Tokens and positions, the positions' indices with an axis of length one."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = (
            nn.Embedding(7, 4),
            nn.Embedding(5, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.head(torch.tanh(self.tokens(x) + self.places(places)))


def test_positions_with_a_unit_axis():
    model, x = seeded(Embedded), torch.arange(12).view(4, 3) % 7
    program = fxkfac.trace(model, x)
    data = x, rand(4, 3, 2)
    assert program.tapped.dynamic
    assert max(fxkfac.check(program, nn.MSELoss(), data).values()) < 1e-9
    one = x[:1], rand(1, 3, 2)
    factors = fxkfac.kfac(program, nn.MSELoss(reduction="sum"), data)
    assert factors["places.weight"].A.tolist() == [8.0, 8.0, 8.0, 0.0, 0.0]
    single = fxkfac.kfac(program, nn.MSELoss(), one, sharing="reduce")
    assert single.dense().isfinite().all()


def test_the_diagonal_of_a_number():
    params, x = {"s": torch.tensor(0.3, dtype=F64)}, rand(4, 3)

    def f(params, x):
        return params["s"].exp() * x

    program = fxkfac.trace(f, x, params, unsupported="diagonal")
    data = x, rand(4, 3)
    found = fxkfac.kfac(program, nn.MSELoss(), data)["s"].diagonal
    expected = fxkfac.exact.ggn(f, nn.MSELoss(), data, ["s"], params)
    torch.testing.assert_close(found.reshape(1, 1), expected)


def spread(params, x):
    """One weight for all heads; the input has no axis for them."""
    return torch.tanh(x.unsqueeze(1) @ params["W"].expand(3, 4, 2))


def written_out(params, x):
    return torch.tanh(x.unsqueeze(1).expand(-1, 3, -1, -1) @ params["W"])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "dense"])
def test_input_that_lacks_one_of_several_shared_axes(sharing, structure):
    params, x, y = {"W": rand(4, 2)}, rand(5, 6, 4), rand(5, 3, 6, 2)
    found, expected = (
        fxkfac.kfac(
            fxkfac.trace(f, x, params, structure={"W": structure}),
            nn.MSELoss(),
            (x, y),
            sharing=sharing,
        )
        for f in (spread, written_out)
    )
    torch.testing.assert_close(found.dense(), expected.dense())


def test_a_small_gradient_is_no_rounding():
    """In float32, what is lost of a gradient far smaller than another is still seen."""
    expected = {"large": torch.ones(4), "small": torch.full((4,), 1e-5), "none": torch.zeros(4)}
    found = {"large": torch.ones(4), "small": torch.zeros(4), "none": torch.full((4,), 1e-8)}
    errors = gradient_errors(found, expected, torch.float32)
    assert errors["small"] == 1.0
    assert errors["none"] < 1e-7


class Faint(nn.Module):
    """A unit that is off, of inputs that hardly differ: as far from those of an untrained net."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        z = torch.tanh(self.first(x))
        return (z + torch.relu(self.second(1.0 + 1e-5 * z) - 9.0)).mean((2, 3))


def test_data_that_hardly_differ_are_told_apart():
    """All rows are about equal, so that other splits of other axes explain them to half the digits.

    A bias by itself has one row for each datum, so that its block is exact.
    """
    model, data = seeded(Faint).float(), (rand(3, 1, 8, 8).float(), rand(3, 3).float())
    program = fxkfac.trace(model, data[0])
    found = fxkfac.kfac(program, nn.MSELoss(), data, separate_weight_and_bias=True)
    for name in ("first.bias", "second.bias"):
        expected = fxkfac.exact.ggn(model, nn.MSELoss(), data, [name])
        torch.testing.assert_close(found[name].dense(), expected, rtol=1e-4, atol=0.0)
