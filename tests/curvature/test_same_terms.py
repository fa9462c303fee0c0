"""Sums of two graphs are of the same terms, or are refused: other entries, another orientation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import F64, classes, rand, seeded
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac.errors import MergeError, UnsupportedUse

MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
W = rand(4, 4, seed=1)
FLAT = rand(6, 4, seed=2), rand(6, 4, seed=3)
SQUARE = rand(5, 3, 4, seed=4), rand(5, 4, seed=5)


def by_shape(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A square weight that shorter inputs use as it is, and longer ones transposed."""
    return x @ params["W"] if x.ndim == 2 else (x @ params["W"].T).mean(1)


def program_by_shape() -> fxkfac.Program:
    return fxkfac.trace(by_shape, FLAT[0], {"W": W})


def added() -> Any:
    one, other = (fxkfac.trace(f, FLAT[0], {"W": W}) for f in (by_shape, lambda p, x: x @ p["W"].T))
    return fxkfac.kfac(one, MSE, FLAT) + fxkfac.kfac(other, MSE, FLAT)


def averaged() -> Any:
    program, average = program_by_shape(), fxkfac.RunningAverage(0.5)
    average.update(fxkfac.kfac(program, MSE, FLAT))
    average.update(fxkfac.kfac(program, MSE, SQUARE))


def corrected() -> Any:
    program = program_by_shape()
    return fxkfac.ekfac(program, MSE, SQUARE, fxkfac.kfac(program, MSE, FLAT))


def influence() -> Any:
    program = program_by_shape()
    return fxkfac.influence(program, MSE, fxkfac.kfac(program, MSE, FLAT), FLAT, SQUARE, 0.1)


def stepped() -> Any:
    optimizer = fxkfac.optim.KFAC(program_by_shape(), MSE, lr=0.0)
    optimizer.step(*FLAT)
    optimizer.step(*SQUARE)


ADDED: dict[str, Callable[[], Any]] = {
    "batches": lambda: fxkfac.kfac(program_by_shape(), MSE, [FLAT, SQUARE]),
    "step": lambda: fxkfac.step(program_by_shape(), MSE, [FLAT, SQUARE]),
    "factors": added,
    "averages": averaged,
    "corrections": corrected,
    "influence": influence,
    "optimizer": stepped,
}


@pytest.mark.parametrize("name", ADDED)
def test_a_weight_in_two_orientations_is_refused(name: str) -> None:
    with pytest.raises(MergeError, match=r"use \['W'\] in other ways .*'W': 'diagonal'"):
        ADDED[name]()


class Positions(nn.Module):
    """Adds some of a table's rows: the first ones, or those from an attribute on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))
        self.head = nn.Linear(4, 3)
        self.start = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[self.start : self.start + x.shape[1]]
        return self.head((x + rows).tanh().mean(1))


def sequences(length: int) -> tuple[Tensor, Tensor]:
    return rand(5, length, 4, seed=length), classes(5, C=3)


def test_lengths_that_reach_other_rows_of_a_table() -> None:
    model = seeded(Positions).to(F64)
    data = [sequences(4), sequences(6)]
    program = fxkfac.trace(model, data[0][0])
    with pytest.raises(MergeError, match=r"use \['table'\] in other ways"):
        fxkfac.kfac(program, CE, data)
    program = fxkfac.trace(model, data[0][0], structure={"table": "diagonal"})
    factors = fxkfac.kfac(program, CE, data)
    parts = [exact.ggn(model, CE, batch, ["table"]).diagonal() for batch in data]
    assert factors["table"].diagonal.flatten().allclose(sum(parts) / 2, rtol=1e-10, atol=0)


def test_rows_that_an_attribute_chooses() -> None:
    model, batch = seeded(Positions).to(F64), sequences(4)
    program = fxkfac.trace(model, batch[0])
    accumulation = fxkfac.Accumulation(program, CE)
    accumulation.add(*batch)
    model.start = 4
    with pytest.raises(MergeError, match=r"use \['table'\] in other ways"):
        accumulation.add(*batch)
    assert accumulation.n == 5
    model.start = 0
    accumulation.add(*batch)
    assert accumulation.n == 10


@pytest.mark.parametrize("unsupported", ["dense", "diagonal", "identity", "skip"])
def test_a_weight_that_has_no_factors_in_another_shape_is_no_block_of_zeros(
    unsupported: str,
) -> None:
    def by_shape(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ params["W"] if x.ndim == 2 else (x @ params["W"].exp()).mean(1)

    program = fxkfac.trace(by_shape, FLAT[0], {"W": W}, unsupported)
    factors = fxkfac.kfac(program, MSE, FLAT)
    with pytest.raises(UnsupportedUse, match=r"'W' has factors in the graph of the inputs"):
        fxkfac.kfac(program, MSE, SQUARE)
    with pytest.raises(UnsupportedUse, match=r"'W' has factors in the graph of the inputs"):
        fxkfac.influence(program, MSE, factors, FLAT, SQUARE, 0.1)
    assert fxkfac.kfac(program, MSE, FLAT)["W"].dense().equal(factors["W"].dense())
    program = fxkfac.trace(by_shape, FLAT[0], {"W": W}, structure={"W": "diagonal"})
    found = fxkfac.kfac(program, MSE, SQUARE)["W"].diagonal
    expected = exact.ggn(by_shape, MSE, SQUARE, ["W"], {"W": W}).diagonal()
    assert found.flatten().allclose(expected, rtol=1e-10, atol=0)


def test_shapes_that_use_a_weight_alike_add_up() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).to(F64)
    program = fxkfac.trace(model, FLAT[0])
    one = fxkfac.kfac(program, MSE, (FLAT[0], rand(6, 3)))
    other = fxkfac.kfac(program, MSE, (SQUARE[0], rand(5, 3, 3)))
    assert len(program.graphs) == 2
    assert (one + other).n == 11
