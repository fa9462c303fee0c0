"""The factors and exact blocks of many models against their definition, written out by hand.

The definitions are in `reference/tape.py`, the forward passes by hand in its other modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from quick import one_in, quick
from reference import CASES, N
from reference.case import assert_close, targets_for
from reference.tape import Loss, Params, Tape
from terms import grouped
from torch import Tensor, nn

import fxkfac


@dataclass(frozen=True)
class Recorded:
    """A case that was run, by hand and by the compiler.

    Attributes:
        tape: What the layers by hand have seen.
        f: The prediction by hand, the data first.
        loss: What the loss sends back from it.
        program: The compiled model.
        data: Inputs and targets.
        prediction: The model's own prediction.
    """

    tape: Tape
    f: Tensor
    loss: Loss
    program: fxkfac.Program
    data: tuple[Any, Tensor]
    prediction: Tensor


@cache
def recorded(name: str) -> Recorded:
    case = CASES[name]
    (model, params), x = case.build(), case.inputs()
    tape = Tape(stored(model, params), N)
    f = case.forward(tape.params, x, tape)
    inputs = x if isinstance(x, tuple) else (x,)
    prediction = (model(*inputs) if params is None else model(params, *inputs)).detach()
    program = fxkfac.trace(model, x, **case.trace, **({} if params is None else {"params": params}))
    data = x, targets_for(case.loss, prediction)
    return Recorded(tape, f, Loss.at(case.loss, f), program, data, prediction)


def stored(model: Any, params: Mapping[str, Any] | None) -> Params:
    """The parameters by name, those of a function with dots between its dicts' keys."""
    named = model.named_parameters() if isinstance(model, nn.Module) else _flat(params or {})
    return {name: p.detach().requires_grad_() for name, p in named}


def _flat(params: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_forty_models_of_the_zoo_have_a_reference():
    assert len([name for name in CASES if name.startswith("zoo.")]) >= 40


# Models that no other test has, and some of the zoo.
NAMES = quick(CASES, lambda name: not name.startswith("zoo.") or one_in(16)(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_model(name):
    at = recorded(name)
    assert_close(at.prediction.transpose(0, CASES[name].prediction_axis), at.f.detach())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_as_defined(name, sharing):
    """The tape has every block and every term that there is, and each is the same."""
    at, case = recorded(name), CASES[name]
    factors = fxkfac.kfac(at.program, case.loss, at.data, sharing=sharing, **case.kfac)
    found, exact = parts_of(factors)
    assert found.keys() == at.tape.uses.keys()
    assert exact.keys() == at.tape.copies.keys()
    for layer, term in found.items():
        A, B = at.tape.factors(layer, at.f, at.loss, sharing)
        assert_close(grouped(term)[0].expand_as(A), A)
        assert_close(grouped(term)[1], B)
    for parameter, block in exact.items():
        C = at.tape.exact(parameter, at.f, at.loss)
        is_diagonal = isinstance(block, fxkfac.Diagonal)
        assert_close(block.dense(), C.diagonal().diag() if is_diagonal else C)


def parts_of(factors: fxkfac.Factors) -> tuple[dict[tuple[str, int], Any], dict[str, Any]]:
    """The Kronecker products by (block, place in its sum), and the exact blocks by name."""
    products, exact = {}, {}
    for name, block in factors.items():
        terms = getattr(block, "terms", ())
        if not terms or all(t.plan.is_bias for t in terms):
            exact[name] = block
        else:
            products |= {(name, k): term for k, term in enumerate(terms)}
    return products, exact
