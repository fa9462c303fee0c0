"""Cases: a model, and the same model by hand. They register into `CASES` by name.

    @of_the_zoo
    def lora_trained(p, x, tape):
        return (tape.layer("B", tape.layer("A", x, p["A"]), p["B"]) + ...).tanh()

is the reference of the zoo's entry of that name, and

    @case(lambda: nn.Linear(4, 3), lambda: rand(N, 4), MSE)
    def linear(p, x, tape):
        return tape.linear("", x)

that of a model which is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_wide  # noqa: F401 - registers its entries
from torch import Tensor, nn
from zoo import ZOO, Model, ints, rand

from reference.tape import Params, Tape

N = 3  # data in every batch
MSE, MSE_SUM = nn.MSELoss(), nn.MSELoss(reduction="sum")
CE, CE_SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")

Forward = Callable[[Params, Any, Tape], Tensor]
Register = Callable[[Forward], Forward]


@dataclass(frozen=True)
class Case:
    """A model, and the same model by hand.

    Attributes:
        build: () -> (model, params), with `params` the nested dict of a functional model.
        inputs: Its inputs for N data.
        forward: (parameters, inputs, tape) -> the prediction, the data first.
        loss: The loss.
        prediction_axis: Batch axis of the model's prediction.
        trace, kfac: Further arguments of `fxkfac.trace` and `fxkfac.kfac`.
    """

    build: Callable[[], tuple[Model, Mapping[str, Any] | None]]
    inputs: Callable[[], Any]
    forward: Forward
    loss: nn.Module
    prediction_axis: int = 0
    trace: Mapping[str, Any] = field(default_factory=dict)
    kfac: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(
    build: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    loss: nn.Module,
    prediction_axis: int = 0,
    kfac: Mapping[str, Any] | None = None,
    **trace: Any,
) -> Register:
    """Register a forward pass by hand as the reference of the module that `build` makes."""

    def register(forward: Forward) -> Forward:
        made = Case(
            lambda: (seeded(build), None), inputs, forward, loss, prediction_axis, trace, kfac or {}
        )
        return _add(forward.__name__, made, forward)

    return register


def of_the_zoo(forward: Forward) -> Forward:
    """Register a forward pass by hand as the reference of the zoo's entry of the same name."""
    entry = ZOO[forward.__name__]
    made = Case(
        entry.build,
        lambda: entry.inputs(N),
        forward,
        entry.loss,
        entry.target_axis,
        entry.trace_options,
    )
    return _add(f"zoo.{entry.name}", made, forward)


def _add(name: str, made: Case, forward: Forward) -> Forward:
    assert name not in CASES, f"{name} has a reference already"
    CASES[name] = made
    return forward


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A module in float64 whose parameters are drawn from seeds."""
    model = build().double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(0.5 * rand(*p.shape, seed=k + 20))
    return model


def targets_for(loss: nn.Module, f: Tensor) -> Tensor:
    """Targets for a prediction; for cross-entropy the classes are on its axis 1."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return ints(f.shape[0], *f.shape[2:], high=f.shape[1], seed=5)
    drawn = rand(*f.shape, seed=5)
    return drawn.sigmoid() if isinstance(loss, nn.BCEWithLogitsLoss) else drawn


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To ten digits of the largest entry."""
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)
