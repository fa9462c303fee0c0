"""Whether two libraries have the same factors; who has not is not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.interface import Factors, Prepared, Slope
from benchmarks.problems import Problem

EQUAL = 1e-3  # relative error of A ⊗ B in single precision, at most
SAMPLED_EQUAL = 0.25  # of factors averaged over draws of labels
DRAWS = 100


def distance(found: Factors, expected: Factors) -> float:
    """The largest relative Frobenius distance of A ⊗ B over the layers.

    The products are compared, as libraries differ in which of the two has the scale. A peer that
    has the bias apart is compared in the weight's part of A.
    """
    return _largest(_relative(*_same_part(found[name], expected[name])) for name in expected)


def distance_of_inputs(found: Factors, expected: Factors) -> float:
    """The same of A alone and up to its scale: what no random label enters."""
    return _largest(_relative_input(*_same_part(found[n], expected[n])) for n in expected)


def _largest(values: Iterable[float]) -> float:
    """The maximum; infinite where one is not a number, which `max` passes over."""
    return max(float("inf") if math.isnan(value) else value for value in values)


def _same_part(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """In double precision, and the weight's part of A where one has the bias apart."""
    size = min(found[0].shape[-1], expected[0].shape[-1])
    a, b, c, d = (t.double() for t in (*found, *expected))
    return [a[:size, :size], b], [c[:size, :size], d]


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖A⊗B − A'⊗B'‖ / ‖A'⊗B'‖, from (A − A')⊗B + A'⊗(B − B') without cancellation."""
    (a, b), (c, d) = found, expected
    if a.shape != c.shape or b.shape != d.shape:
        return float("inf")
    scale = _scale(a, c)
    a, b = a * scale, b / scale  # all of the scale is in b
    da, db = a - c, b - d
    square = (da * da).sum() * (b * b).sum() + (c * c).sum() * (db * db).sum()
    square += 2 * (da * c).sum() * (b * db).sum()
    return (square.clamp_min(0).sqrt() / (c.norm() * d.norm())).item()


def _relative_input(found: list[Tensor], expected: list[Tensor]) -> float:
    a, c = found[0], expected[0]
    if a.shape != c.shape:
        return float("inf")
    return ((_scale(a, c) * a - c).norm() / c.norm()).item()


def _scale(a: Tensor, c: Tensor) -> Tensor:
    """That brings a nearest to c."""
    return (c * a).sum() / (a * a).sum()


def slope_of(problem: Problem) -> Slope:
    """Loss and gradients by `torch.autograd.grad`, of a problem of one batch."""
    ((x, y),) = problem.batches
    loss = problem.loss(problem.model(x), y)
    gradients = torch.autograd.grad(loss, problem.params)
    return Slope(loss.detach(), dict(zip(problem.names, gradients, strict=True)))


def distance_of_slopes(found: Slope, problem: Problem) -> float:
    """The largest relative distance of the loss and of each parameter's gradient to autograd's.

    Of autograd in single and in double precision the nearer one counts: where a ReLU's input is
    zero but for rounding, one gradient is as good as the other.
    """
    off = distance_to(found, slope_of(problem))
    if off > EQUAL:
        off = min(off, distance_to(found, slope_of(in_double(problem))))
    return off


def in_double(problem: Problem) -> Problem:
    """The same problem in double precision."""
    batches = [
        tuple(t.double() if t.is_floating_point() else t for t in b) for b in problem.batches
    ]
    return replace(problem, model=deepcopy(problem.model).double(), batches=batches)


def distance_to(found: Slope, expected: Slope) -> float:
    """The same of a slope that is known.

    Gradients are relative to at least a thousandth of the largest, as some are zero.
    """
    norms = {name: g.norm().item() for name, g in expected.gradients.items()}
    least = max(norms.values()) / 1000
    off = [
        (found.gradients[name].detach() - g).norm().item() / max(norms[name], least)
        for name, g in expected.gradients.items()
    ]
    return _largest([*off, abs((found.loss / expected.loss).item() - 1)])


def averaged(prepared: Prepared, flavour: str) -> Factors:
    """The factors of a call; of random labels B is averaged over many."""
    total = prepared.read(prepared.call())
    if is_exact(flavour):
        return total
    total = {name: (A.clone(), B.clone()) for name, (A, B) in total.items()}
    for _ in range(DRAWS - 1):
        for name, (_, B) in prepared.read(prepared.call()).items():
            total[name][1].add_(B)
    return {name: (A, B / DRAWS) for name, (A, B) in total.items()}


def is_exact(flavour: str) -> bool:
    """Whether the flavour is the same at every call."""
    return flavour in ("empirical", "type-2")


def tolerance(flavour: str) -> float:
    """The largest distance that counts as equal."""
    return EQUAL if is_exact(flavour) else SAMPLED_EQUAL


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or the reason why there is none, in one line."""
    try:
        return action(), None
    except Exception as error:
        words = " ".join(str(error).split())
        name = type(error).__name__
        return None, (words if name == "Refused" else f"{name}: {words}")[:300]
