"""Weights that are repeated for the data before they meet them, in whatever layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quick import quick
from torch import Tensor
from zoo import MSE, rand

import fxkfac
from fxkfac import errors

HEADS = {"W": rand(2, 4, 3)}  # heads, in, out


def einsum(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.einsum("nhti,hio->nhto", x, params["W"])


def repeated(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Heads of all data in one axis, with a copy of the weight for each datum."""
    weight = params["W"].repeat(x.shape[0], 1, 1)
    return torch.bmm(x.flatten(0, 1), weight).unflatten(0, (-1, 2))


def expanded(params: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = params["W"].expand(x.shape[0], 2, 4, 3).reshape(-1, 4, 3)
    return torch.bmm(x.flatten(0, 1), weight).unflatten(0, (-1, 2))


def interleaved(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The copies of each head next to each other."""
    weight = params["W"][:, None].expand(2, x.shape[0], 4, 3).reshape(-1, 4, 3)
    y = torch.bmm(x.transpose(0, 1).flatten(0, 1), weight)
    return y.unflatten(0, (2, -1)).transpose(0, 1)


@pytest.mark.parametrize("model", [repeated, expanded, interleaved])
@pytest.mark.parametrize("sharing", quick(["expand", "reduce"], "reduce".__eq__))
def test_heads_repeated_for_the_data_are_the_heads(model, sharing):
    x, y = rand(5, 2, 6, 4, seed=1), rand(5, 2, 6, 3, seed=2)
    program = fxkfac.trace(model, x, HEADS)
    for n in (5, 3):
        assert max(fxkfac.check(program, MSE, (x[:n], y[:n])).values()) < 1e-12
        found = fxkfac.kfac(program, MSE, (x[:n], y[:n]), sharing=sharing)
        plain = fxkfac.trace(einsum, x, HEADS)
        expected = fxkfac.kfac(plain, MSE, (x[:n], y[:n]), sharing=sharing)
        torch.testing.assert_close(found.dense("W"), expected.dense("W"))


def test_a_repeated_query_that_a_weight_acts_on():
    """The parameter is what a linear layer acts on, with any number of axes."""

    def probed(params, x):
        query = F.linear(params["probe"].repeat(x.shape[0], 1, 1), torch.eye(4, dtype=x.dtype)[:3])
        return (query @ x[..., :3].mT).softmax(-1) @ x

    params, x, y = {"probe": rand(1, 2, 4)}, rand(5, 6, 4, seed=1), rand(5, 2, 4, seed=2)
    program = fxkfac.trace(probed, x, params, structure={"probe": "dense"})
    assert max(fxkfac.check(program, MSE, (x[:3], y[:3])).values()) < 1e-12
    found = fxkfac.kfac(program, MSE, (x, y)).dense("probe")
    torch.testing.assert_close(found, fxkfac.exact.ggn(probed, MSE, (x, y), "probe", params))


FACTORS = {"a": rand(4, 2), "b": rand(2, 3, seed=1)}


def test_a_derived_weight_may_be_repeated_for_the_data():
    def late(params, x):
        return torch.bmm(x, (params["a"] @ params["b"]).repeat(x.shape[0], 1, 1))

    x, y = rand(5, 6, 4, seed=1), rand(5, 6, 3, seed=2)
    program = fxkfac.trace(late, x, FACTORS, structure={"*": "derived"})
    assert max(fxkfac.check(program, MSE, (x[:3], y[:3])).values()) < 1e-12
    (block,) = fxkfac.kfac(program, MSE, (x, y)).values()
    assert (block.A.shape, block.B.shape) == ((4, 4), (3, 3))


def test_a_derived_weight_for_each_datum_is_refused():
    def early(params, x):
        return torch.bmm(x, params["a"].expand(x.shape[0], 4, 2) @ params["b"].exp())

    with pytest.raises(errors.OptionError, match="the batch size in its shape"):
        fxkfac.trace(early, rand(5, 6, 4), FACTORS, structure={"*": "derived"})


def test_groups_for_each_datum():
    """A weight repeated into as many groups as there are data is no weight of one size."""

    def grouped(params, x):
        n = len(x)
        y = F.conv1d(x.reshape(1, -1, 7), params["w"].repeat(n, 1, 1), groups=n)
        return y.view(n, 3, -1).mean(2)

    params, x, y = {"w": rand(3, 4, 2)}, rand(4, 4, 7, seed=1), rand(4, 3, seed=2)
    program = fxkfac.trace(grouped, x, params)
    for n in (4, 3, 2):
        assert max(fxkfac.check(program, MSE, (x[:n], y[:n])).values()) < 1e-12
    assert not program.tapped.dynamic


def test_a_derived_weight_under_a_derivative_in_the_data():
    def slope(params, x):
        W = params["a"] @ params["b"]
        return torch.func.jvp(lambda at: (at @ W).tanh(), (x,), (torch.ones_like(x),))[1]

    x, y = rand(5, 4, seed=1), rand(5, 3, seed=2)
    program = fxkfac.trace(slope, x, FACTORS, structure={"*": "derived"})
    assert max(fxkfac.check(program, MSE, (x[:3], y[:3])).values()) < 1e-12
