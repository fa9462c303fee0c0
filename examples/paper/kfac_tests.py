"""Section 5.2: where KFAC is exact. Tests 1 and 2, Snippets 25 and 26.

Every block is compared in both orders: B ⊗ A in rvec, A ⊗ B in cvec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import torch
from setting import classes, error, layers_of, mean_square, mlp, numbers, rand, rounded, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU)
REDUCTIONS = ("mean", "sum")
Data = tuple[Tensor, Tensor]
Matrix = Callable[..., Tensor]


def one_datum_type_2() -> None:
    """One datum: KFAC-type-II is the GGN. Test 1, Snippet 25."""
    for net, program, loss, data in _one_datum():
        factors = fxkfac.kfac(program, loss, data, fisher="type-2")
        _require_same(net, factors, _matrix(exact.ggn, net, loss, data))
        print(f"  {_said(net, loss)}: {len(factors)} layers")


def one_datum_monte_carlo() -> None:
    """One datum: KFAC-MC comes near the GGN. Test 1, Snippet 25."""
    net, program = _traced(nn.Tanh)
    for loss, y in (
        (nn.MSELoss(), rand(1, 2, seed=1)),
        (nn.CrossEntropyLoss(), classes(1, count=2)),
    ):
        _require_near(net, program, loss, (rand(1, 5), y))


def one_datum_empirical() -> None:
    """One datum: KFAC-empirical is the empirical Fisher. Test 1, Snippet 25."""
    for net, program, loss, data in _one_datum():
        factors = fxkfac.kfac(program, loss, data, fisher="empirical")
        _require_same(net, factors, _matrix(exact.empirical_fisher, net, loss, data))
        print(f"  {_said(net, loss)}: {len(factors)} layers")


def identical_data() -> None:
    """The same datum several times is as good as one. Section 5.2.1."""
    for net, program, loss, (x, y) in _one_datum():
        data = x.expand(7, -1).clone(), y.repeat(7, *[1] * (y.ndim - 1))
        factors = fxkfac.kfac(program, loss, data, fisher="type-2")
        _require_same(net, factors, _matrix(exact.ggn, net, loss, data))
    print(f"  {len(data[0])} times, for every loss and activation")


def different_data() -> None:
    """With activations and different data KFAC is an approximation. Section 5.2.1."""
    net, program = _traced(nn.Tanh)
    data, loss = (rand(6, 5), rand(6, 2, seed=1)), nn.MSELoss()
    factors = fxkfac.kfac(program, loss, data)
    *lower, last = (
        error(factors.dense(*names), exact.ggn(net, loss, data, names)) for names in layers_of(net)
    )
    assert min(lower) > 0.01
    assert last < 1e-12  # nothing comes between the last layer and the loss
    print(f"  relative errors {rounded(torch.tensor([*lower, last]))}")


def deep_linear_type_2() -> None:
    """A deep linear net with square loss, any data: KFAC-type-II is the GGN. Test 2, Snippet 26."""
    for net, program, data in _deep_linear():
        for reduction in REDUCTIONS:
            loss = nn.MSELoss(reduction=reduction)
            factors = fxkfac.kfac(program, loss, data, fisher="type-2")
            _require_same(net, factors, _matrix(exact.ggn, net, loss, data))
            print(f"  {reduction}, data {tuple(data[0].shape)}: {len(factors)} layers")


def deep_linear_monte_carlo() -> None:
    """KFAC-MC comes near the GGN. Test 2, Snippet 26."""
    for net, program, data in _deep_linear():
        _require_near(net, program, nn.MSELoss(), data)


def deep_linear_empirical() -> None:
    """KFAC-empirical is not the empirical Fisher: its vector depends on the datum. Test 2."""
    for net, program, data in _deep_linear():
        factors = fxkfac.kfac(program, nn.MSELoss(), data, fisher="empirical")
        E = _matrix(exact.empirical_fisher, net, nn.MSELoss(), data)
        off = [error(factors.dense(*names), E(names)) for names in layers_of(net)]
        assert min(off) > 0.1
        print(f"  data {tuple(data[0].shape)}: relative differences {rounded(torch.tensor(off))}")


def _one_datum() -> Iterator[tuple[nn.Module, fxkfac.Program, nn.Module, Data]]:
    """Every activation, loss and reduction, with one datum."""
    x = rand(1, 5)
    targets = {nn.MSELoss: rand(1, 2, seed=1), nn.CrossEntropyLoss: classes(1, count=2)}
    for activation, (kind, y), reduction in product(ACTIVATIONS, targets.items(), REDUCTIONS):
        yield *_traced(activation), kind(reduction=reduction), (x, y)


@cache
def _traced(activation: type[nn.Module]) -> tuple[nn.Module, fxkfac.Program]:
    """A net of three layers; its graph takes batches of any size."""
    net = mlp(5, 4, 4, 2, activation=activation)
    return net, fxkfac.trace(net, rand(6, 5))


@cache
def _deep_linear() -> tuple[tuple[nn.Module, fxkfac.Program, Data], ...]:
    """Three linear layers, without and with an axis along which data are independent."""
    made = []
    for axis in ((), (5,)):
        net, data = mlp(4, 3, 3, 2, activation=None), (rand(6, *axis, 4), rand(6, *axis, 2, seed=1))
        made.append((net, fxkfac.trace(net, data[0]), data))
    return tuple(made)


def _matrix(of: Matrix, net: nn.Module, loss: nn.Module, data: Data) -> Matrix:
    """The dense matrix of some names in some order."""
    return lambda names, vec="rvec": of(net, loss, data, names, vec=vec)


def _require_same(net: nn.Module, factors: fxkfac.Factors, matrix: Matrix) -> None:
    """Every layer's block, over (rvec W, b) and over cvec W̃, which is (cvec W, b)."""
    for names in layers_of(net):
        block = factors[names[0]]
        same(factors.dense(*names), matrix(names))
        same(torch.kron(block.A, block.B), matrix(names, vec="cvec"))


def _require_near(net: nn.Module, program: fxkfac.Program, loss: nn.Module, data: Data) -> None:
    """The error of every layer falls as 1/√M: to a tenth for a hundred times as many labels."""
    G = _matrix(exact.ggn, net, loss, data)

    def errors(M: int, seed: int) -> list[float]:
        drawn = {"fisher": "mc", "mc_samples": M, "generator": numbers(seed)}
        factors = fxkfac.kfac(program, loss, data, **drawn)
        return [error(factors.dense(*names), G(names)) for names in layers_of(net)]

    few, many = (mean_square([errors(M, seed) for seed in range(10)]) for M in (10, 1_000))
    print(f"  {_said(net, loss)}: errors {rounded(few)} for M = 10, {rounded(many)} for M = 1000")
    assert (few / many > 5).all()
    assert (few / many < 20).all()


def _said(net: nn.Module, loss: nn.Module) -> str:
    activation = type(net[1]).__name__ if isinstance(net, nn.Sequential) else ""
    return f"{activation}, {type(loss).__name__}, {loss.reduction}"


if __name__ == "__main__":
    run(globals())
