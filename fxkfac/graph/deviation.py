"""How far gradients that should be equal are off, and how far they may be.

No one tolerance does, above all in half precision: a deep model adds up roundings, and a gradient
that cancels, as of a bias before a norm, is nothing else. Where gradients differ, the model's own
tell, at numbers that are off by a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxkfac.graph.digits import is_half, rounding, tolerance_of_parts


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, or the absolute error where nothing is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (found - expected).norm().item() / (scale if scale > 0 else 1.0)


ROUNDING = 32  # digits lost in the sum over the rows of a gradient that cancels


def gradient_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], lowest: torch.dtype
) -> dict[str, float]:
    """The relative error of every gradient.

    A gradient that is zero but for rounding, as of a bias before batch norm, is measured by the
    largest of all gradients: far below half of the digits, so that nothing lost hides behind it.
    """
    largest = max((float(t.double().norm()) for t in expected.values()), default=0.0)
    errors = {}
    for name, t in expected.items():
        norm = float(t.double().norm())
        is_rounding = norm <= ROUNDING * rounding(t, lowest) * largest
        scale = largest / norm if is_rounding and norm > 0 else 1.0
        errors[name] = relative_error(found[name], t) / scale
    return errors


ROUNDINGS = 4  # times what one rounding of parameters and data does
HIDDEN = 0.1  # of the largest gradient: what rounding may hide in half precision


def compared(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    lowest: torch.dtype,
    rounded: Callable[[], Mapping[str, Tensor]],
) -> tuple[dict[str, float], list[str]]:
    """The relative error of every gradient, and the names of those whose error is no rounding.

    Args:
        found: Gradients.
        expected: What they should be.
        lowest: The dtype with the fewest digits in which anything is computed.
        rounded: What is expected at numbers that are off by a rounding in that; it is asked for
            where gradients differ.
    """
    errors = gradient_errors(found, expected, lowest)
    limits = {name: tolerance_of_parts(t, lowest) for name, t in expected.items()}
    if _beyond(errors, limits):
        limits = _of_rounding(limits, expected, rounded(), lowest)
    return errors, _beyond(errors, limits)


def _beyond(errors: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    return [name for name, error in errors.items() if not error <= limits[name]]


def _of_rounding(
    limits: Mapping[str, float],
    expected: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    lowest: torch.dtype,
) -> dict[str, float]:
    sizes = {name: float(t.double().norm()) for name, t in expected.items()}
    largest = max(sizes.values())
    off = gradient_errors(rounded, expected, lowest)

    def limit(name: str, before: float) -> float:
        hidden = HIDDEN if is_half(lowest) else before
        return max(before, min(ROUNDINGS * off[name], hidden * largest / (sizes[name] or 1.0)))

    return {name: limit(name, before) for name, before in limits.items()}


class Rounded:
    """Moves every number up or down by half of what a rounding in a dtype may take."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.eps = torch.finfo(dtype).eps
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, t: Tensor) -> Tensor:
        """The tensor moved; itself where it holds no floating point numbers."""
        if not t.is_floating_point():
            return t
        up = torch.randint(2, t.shape, generator=self.generator, device="cpu").to(t)
        return t * (1 + self.eps * (up - 0.5))
