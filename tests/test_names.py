"""Parameters by their names: tied ones by any of theirs, none lost, none taken for another."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from drawn import F64, classes, rand, seeded
from torch import Tensor, nn

import fxkfac
from fxkfac.errors import (
    FxkfacError,
    LossError,
    MergeError,
    OptionError,
    ParameterError,
    UnknownParameter,
)
from fxkfac.optim import Preconditioner

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
X, Y = classes(5, C=4), classes(5, C=4, seed=2)


class Tied(nn.Module):
    """An embedding whose weight is that of the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.middle(self.embedding(x)).tanh())
        return found


@cache
def tied() -> fxkfac.Program:
    return fxkfac.trace(seeded(Tied).to(F64), X)


def gradients(first: str) -> dict[str, Tensor]:
    """Those of all parameters, the tied one by this name."""
    shapes = {first: (4, 3), "middle.weight": (3, 3), "middle.bias": (3,), "head.bias": (4,)}
    return {name: rand(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}


def solved_by_factors(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return fxkfac.kfac(tied(), CE, (X, Y)).solve(given, damping=0.1)


def solved_by_total(given: dict[str, Tensor]) -> dict[str, Tensor]:
    factors = fxkfac.kfac(tied(), CE, (X, Y))
    return fxkfac.sum_of(factors, factors).solve(given, damping=0.1)


def solved_by_preconditioner(given: dict[str, Tensor]) -> dict[str, Tensor]:
    preconditioner = Preconditioner(tied(), CE, damping=0.1, damp="block", fisher="type-2")
    preconditioner.update(X, Y)
    return preconditioner.solve(given)


SOLVED = [solved_by_factors, solved_by_total, solved_by_preconditioner]


@pytest.mark.parametrize("solve", SOLVED)
def test_a_tied_parameter_by_its_other_name(solve: Any) -> None:
    expected = solve(gradients("embedding.weight"))
    found = solve(gradients("head.weight"))
    assert list(found) == list(gradients("head.weight"))
    for mine, theirs in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not found["head.weight"].equal(gradients("head.weight")["head.weight"])


@pytest.mark.parametrize("solve", SOLVED)
def test_one_parameter_by_two_names(solve: Any) -> None:
    twice = gradients("embedding.weight") | {"head.weight": rand(4, 3)}
    with pytest.raises(OptionError, match="are names of one tied parameter"):
        solve(twice)


@pytest.mark.parametrize("solve", SOLVED)
def test_names_that_nothing_has(solve: Any) -> None:
    wrong = gradients("embedding.weight") | {"midle.weight": rand(3, 3)}
    with pytest.raises(UnknownParameter, match=r"'midle\.weight'.*'middle\.weight'"):
        solve(wrong)


@pytest.mark.parametrize("solve", SOLVED)
def test_a_gradient_that_is_none(solve: Any) -> None:
    with pytest.raises(OptionError, match=r"'middle\.bias' is of type NoneType; expected a tensor"):
        solve({**gradients("embedding.weight"), "middle.bias": None})


def test_gradients_of_what_has_no_block() -> None:
    """Of an optimizer's parameters some may have none: `solve` of factors leaves them out."""
    model = seeded(Tied).to(F64)
    program = fxkfac.trace(model, X, params=["middle.*"])
    found = fxkfac.kfac(program, CE, (X, Y)).solve(gradients("head.weight"), damping=0.1)
    assert list(found) == ["middle.weight", "middle.bias"]


@pytest.mark.parametrize(
    "params",
    [{"a": {"b": rand(4, 3)}, "a.b": rand(4, 3)}, {0: rand(4, 3), "0": rand(4, 3)}],
    ids=["dots", "numbers"],
)
def test_two_tensors_of_one_name(params: dict[Any, Any]) -> None:
    with pytest.raises(ParameterError, match="two tensors of params are called"):
        fxkfac.trace(lambda p, x: x @ next(iter(p.values())), rand(5, 4), params)


def test_zero_is_no_generator() -> None:
    program = fxkfac.trace(seeded(lambda: nn.Linear(4, 3)).to(F64), rand(5, 4))
    data = rand(5, 4), rand(5, 3)
    factors = fxkfac.kfac(program, MSE, data)
    calls = [
        lambda: fxkfac.kfac(program, MSE, data, fisher="mc", generator=0),
        lambda: fxkfac.step(program, MSE, data, fisher="mc", generator=0),
        lambda: fxkfac.ekfac(program, MSE, data, factors, generator=0),
        lambda: fxkfac.kfoc(program, MSE, data, factors, generator=0),
    ]
    for call in calls:
        with pytest.raises(FxkfacError, match=r"expected a torch\.Generator"):
            call()


def test_tied_parameters_stay_tied_in_params() -> None:
    zero = torch.zeros(3, dtype=F64)
    params = {"W": rand(4, 3), "first": zero, "second": zero}

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["W"] + p["first"]) + p["second"]).tanh()

    program, data = fxkfac.trace(model, rand(5, 4), params), (rand(5, 4), rand(5, 3))
    apart = {**params, "first": rand(3, seed=1), "second": rand(3, seed=2)}
    with pytest.raises(ParameterError, match=r"'first'.*'second'.*were one parameter"):
        fxkfac.kfac(program, MSE, data, params=apart)
    together = {**apart, "second": apart["first"].clone()}
    expected = fxkfac.kfac(program, MSE, data, params={"W": params["W"], "first": apart["first"]})
    found = fxkfac.kfac(program, MSE, data, params=together)
    torch.testing.assert_close(found["W"].dense(), expected["W"].dense())


@pytest.mark.parametrize("names", [("middle.bias",) * 2, ("embedding.weight", "head.weight")])
def test_a_parameter_that_is_named_twice(names: tuple[str, str]) -> None:
    with pytest.raises(ParameterError, match="is named twice"):
        fxkfac.kfac(tied(), CE, (X, Y)).dense(*names)


def test_names_in_a_list() -> None:
    factors = fxkfac.kfac(tied(), CE, (X, Y))
    for call in (factors.dense, factors.operator):
        with pytest.raises(ParameterError, match="a name is of type list; expected text"):
            call(["middle.weight"])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="params holds a Parameter; expected names"):
        fxkfac.trace(Tied(), X, list(Tied().parameters()))


def test_a_model_is_no_program() -> None:
    model: Any = nn.Linear(4, 3)
    data = rand(5, 4).float(), rand(5, 3).float()
    factors = fxkfac.kfac(fxkfac.trace(model, data[0]), MSE, data)
    calls: list[Any] = [
        lambda: fxkfac.kfac(model, MSE, data),
        lambda: fxkfac.step(model, MSE, data),
        lambda: fxkfac.check(model, MSE, data),
        lambda: fxkfac.ekfac(model, MSE, data, factors),
        lambda: fxkfac.influence(model, MSE, factors, data, data, 0.1),
        lambda: fxkfac.optim.KFAC(model, MSE, lr=0.1),
        lambda: fxkfac.load("nowhere.safetensors", model, MSE),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="program is of type Linear; expected what"):
            call()


def test_what_is_no_loss_no_mask_and_no_factors() -> None:
    program = fxkfac.trace(nn.Linear(4, 3), rand(5, 4).float())
    data = rand(5, 4).float(), rand(5, 3).float()
    factors = fxkfac.kfac(program, MSE, data)
    for loss in (nn.functional.mse_loss, nn.MSELoss, None):
        with pytest.raises(LossError, match="no likelihood is known"):
            fxkfac.step(program, loss, data)
    wrong: Any = torch.ones(5, 3)
    with pytest.raises(OptionError, match="mask is of type Tensor; expected the keyword"):
        fxkfac.kfac(program, MSE, data, mask=wrong)
    several: Any = [factors, factors]
    with pytest.raises(MergeError, match="a part is of type list"):
        fxkfac.sum_of(several)
    corrected: Any = fxkfac.ekfac(program, MSE, data, factors)
    with pytest.raises(OptionError, match="factors is of type Corrected"):
        fxkfac.RunningAverage().update(corrected)
