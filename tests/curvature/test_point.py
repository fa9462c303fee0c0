"""Factors know the parameters they were computed at, and are refused at others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxkfac
from fxkfac import laplace
from fxkfac.curvature.point import Point
from fxkfac.errors import MergeError

LOSS = nn.CrossEntropyLoss()
Case = tuple[nn.Module, fxkfac.Program, tuple[Tensor, Tensor]]


class Net(nn.Module):
    """With a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)
        self.nowhere = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(7, 3).double(), torch.randint(3, (7,))
    return model, fxkfac.trace(model, x, ["first.*", "last.*"]), (x, y)


def posterior(case: Case, factors: Any, params: Any = None) -> Any:
    return laplace.posterior(factors, params=params)


def influence(case: Case, factors: Any, params: Any = None) -> Any:
    _, program, data = case
    return fxkfac.influence(program, LOSS, factors, data, data, 1e-2, params=params)


def token_influence(case: Case, factors: Any, params: Any = None) -> Any:
    _, program, data = case
    return fxkfac.token_influence(program, LOSS, factors, data, data, 1e-2, params=params)


def ekfac(case: Case, factors: Any, params: Any = None) -> Any:
    return fxkfac.ekfac(case[1], LOSS, case[2], factors, params=params)


def kfoc(case: Case, factors: Any, params: Any = None) -> Any:
    return fxkfac.kfoc(case[1], LOSS, case[2], factors, params=params, steps=1)


CALLS = [posterior, influence, token_influence, ekfac, kfoc]
Call = Callable[..., Any]


def train(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def refused() -> Any:
    return pytest.raises(MergeError, match=r"'first\.weight', .* other values .* Compute")


@pytest.mark.parametrize("call", CALLS)
def test_factors_are_refused_once_parameters_were_trained(case: Case, call: Call) -> None:
    model, program, data = case
    factors = fxkfac.kfac(program, LOSS, data)
    call(case, factors)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, fused=True)  # which no version counter sees
    with refused():
        call(case, factors)
    model.load_state_dict(before, assign=True)  # other tensors of the same values
    call(case, factors)


@pytest.mark.parametrize("call", CALLS)
def test_factors_at_other_parameters_are_for_these_alone(case: Case, call: Call) -> None:
    model, program, data = case
    params = {n: 2 * p.detach() for n, p in model.named_parameters() if n != "nowhere"}
    factors = fxkfac.kfac(program, LOSS, data, params)
    call(case, factors, params)
    call(case, factors, {name: p.clone() for name, p in params.items()})
    with refused():
        call(case, factors)


@pytest.mark.parametrize("call", [posterior, influence])
def test_corrected_factors_are_refused_too(case: Case, call: Call) -> None:
    model, program, data = case
    corrected = fxkfac.ekfac(program, LOSS, data, fxkfac.kfac(program, LOSS, data))
    call(case, corrected)
    train(model)
    with refused():
        call(case, corrected)


def test_a_parameter_that_nothing_uses_may_change(case: Case) -> None:
    model, program, data = case
    factors = fxkfac.kfac(program, LOSS, data)
    with torch.no_grad():
        model.nowhere.zero_()
    laplace.posterior(factors)


def test_a_frozen_parameter_may_not(case: Case) -> None:
    model, _, data = case
    factors = fxkfac.kfac(fxkfac.trace(model, data[0], ["last.*"]), LOSS, data)
    with torch.no_grad():
        model.first.bias.zero_()
    with pytest.raises(MergeError, match=r"\['first\.bias'\]"):
        laplace.posterior(factors)


def test_another_dtype_says_nothing(case: Case) -> None:
    model, program, data = case
    factors = fxkfac.kfac(program, LOSS, data)
    model.float()
    laplace.posterior(factors)


def test_sums_are_of_one_point_or_of_none(case: Case) -> None:
    model, program, data = case
    first, same = (fxkfac.kfac(program, LOSS, data) for _ in range(2))
    accumulation = fxkfac.Accumulation(program, LOSS)
    accumulation.add(*data)
    at_one = [first + same, accumulation.factors()]
    for factors in at_one:
        laplace.posterior(factors)
    train(model)
    for factors in at_one:
        with refused():
            laplace.posterior(factors)
    laplace.posterior(first + fxkfac.kfac(program, LOSS, data))


def test_what_was_saved_or_averaged_makes_no_claim(case: Case, tmp_path: Path) -> None:
    model, program, data = case
    factors, average = fxkfac.kfac(program, LOSS, data), fxkfac.RunningAverage()
    average.update(factors)
    fxkfac.save(factors, tmp_path / "factors.fxk")
    train(model)
    average.update(fxkfac.kfac(program, LOSS, data))
    assert average.averages.point is None
    laplace.posterior(fxkfac.load(tmp_path / "factors.fxk", program, LOSS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_a_point_is_of_values_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    room = torch.randn(36).to(dtype)
    first = room[1:].view(5, 7)
    others = [first.clone(), first.T.contiguous().T, torch.cat([room[:1], room])[2:].view(5, 7)]
    point = Point.of({"W": first}, ["W"])
    assert all(point == Point.of({"W": other}, ["W"]) for other in others)
    assert point.moved({"W": first, "b": room}) == []


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "other signs": lambda t: -t,
    "one other sign": lambda t: torch.cat([-t[:1], t[1:]]),
    "twice as large": lambda t: 2 * t,
    "half as large": lambda t: t / 2,
    "one step of rounding": lambda t: torch.cat([t[:-1], t[-1:].nextafter(2 * t[-1:])]),
}


@pytest.mark.parametrize("number", [3, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_a_point_moves_with_every_change(change: str, dtype: torch.dtype, number: int) -> None:
    torch.manual_seed(0)
    before = torch.randn(number, dtype=dtype)
    point = Point.of({"W": before}, ["W"])
    assert point.moved({"W": before.clone()}) == []
    assert point.moved({"W": CHANGES[change](before)}) == ["W"]


def test_a_point_takes_little_room() -> None:
    point = Point.of({"W": torch.randn(1000, 70), "b": torch.randn(7)}, ["W", "b"])
    assert {name: len(t) for name, t in point.entries.items()} == {"W": 256, "b": 7}
    assert all(t.untyped_storage().nbytes() == 4 * 263 for t in point.entries.values())


def test_sums_over_two_points_are_of_none(case: Case) -> None:
    model, program, (x, y) = case
    accumulation = fxkfac.Accumulation(program, LOSS)
    accumulation.add(x[:3], y[:3])
    accumulation.add(x[3:], y[3:])
    assert accumulation.factors().point == fxkfac.kfac(program, LOSS, (x, y)).point
    with torch.no_grad():
        model.first.weight *= 3  # type: ignore[operator]
    accumulation.add(x, y)
    assert accumulation.factors().point is None
