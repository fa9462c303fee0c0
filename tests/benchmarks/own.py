"""fxkfac, eager and compiled, and the plain hooks; and what the installed fxkfac does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import fxkfac
from benchmarks.hooks import HookedKFAC
from benchmarks.interface import Factors, Prepared, Refused, Slope
from benchmarks.problems import STEP, Problem

INDUCTOR = "inductor"


def absent() -> dict[str, str]:
    """Flavours and libraries that are left out, as the installed fxkfac lacks what is named."""
    missing = {}
    if not hasattr(fxkfac, "step"):
        missing[STEP] = "fxkfac.step"
    if not _has_backend(fxkfac.kfac):
        missing[INDUCTOR] = "fxkfac.kfac(backend=...)"
    return missing


def _has_backend(function: Callable[..., Any]) -> bool:
    return "backend" in inspect.signature(function).parameters


def fxkfac_factors(problem: Problem, flavour: str) -> Prepared:
    """By `fxkfac.kfac`, or `fxkfac.step`."""
    return _fxkfac(problem, flavour, {})


def inductor_factors(problem: Problem, flavour: str) -> Prepared:
    """The same, compiled."""
    return _fxkfac(problem, flavour, {"backend": INDUCTOR})


def _fxkfac(problem: Problem, flavour: str, options: dict[str, Any]) -> Prepared:
    function = _function(flavour)
    if "backend" in options and not _has_backend(function):
        raise Refused("not there: no argument backend")
    program = fxkfac.trace(problem.model, problem.batches[0][0], **_asked(problem, flavour))
    data: Any = problem.batches[0] if len(problem.batches) == 1 else problem.batches
    options = options | {"fisher": "mc" if flavour == STEP else flavour}
    if not problem.joint:
        options["separate_weight_and_bias"] = True

    def call() -> Any:
        return function(program, problem.loss, data, **options)

    def read(result: Any) -> Factors:
        factors = result.factors if flavour == STEP else result
        blocks = {name: factors[f"{name}.weight"] for name in problem.layers}
        return {name: (block.A, block.B) for name, block in blocks.items()}

    return Prepared(call, read, lambda result: Slope(result.loss, dict(result.gradients)))


def _asked(problem: Problem, flavour: str) -> dict[str, Any]:
    """Whose factors all libraries give: without joint blocks those of the weights alone.

    A step gives the gradients of all parameters nevertheless.
    """
    if problem.joint:
        return {}
    if flavour == STEP:
        return {"structure": {f"{name}.bias": "skip" for name in problem.layers}}
    return {"params": [f"{name}.weight" for name in problem.layers]}


def _function(flavour: str) -> Callable[..., Any]:
    if flavour != STEP:
        return fxkfac.kfac
    if not hasattr(fxkfac, "step"):
        raise Refused("not there: fxkfac.step")
    return fxkfac.step


def hooks_factors(problem: Problem, flavour: str) -> Prepared:
    """By the plain loop."""
    hooked = HookedKFAC(problem)
    if flavour == STEP:
        return Prepared(hooked.step, lambda result: result[1], lambda result: result[0])
    return Prepared(lambda: hooked.factors(flavour), lambda result: result)
