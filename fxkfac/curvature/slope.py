"""The loss's own gradients: of one batch, and the sum over batches.

A batch's cotangent is scaled, which has the size of its prediction, so that gradients of one batch
need no pass of their own to scale them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxkfac.curvature.factors import scale_of
from fxkfac.curvature.together import summed_gradients
from fxkfac.errors import NonFiniteError
from fxkfac.isolation import not_finite
from fxkfac.likelihoods.base import Likelihood, count_of
from fxkfac.precision import ACCURATE


class Slope(NamedTuple):
    """The criterion of one batch, and its gradients.

    Attributes:
        criterion: Σ_n c(f_n, y_n), without R.
        gradients: Of the wanted parameters, at least in float32; `None` where there is no way to
            one.
        scale: What these gradients are multiplied by.
    """

    criterion: Tensor
    gradients: Sequence[Tensor | None]
    scale: float = 1.0


def slope_of(
    likelihood: Likelihood,
    prediction: Tensor,
    targets: Any,
    gradients: Callable[[Tensor], Sequence[Tensor | None]],
    underflows: bool,
    scale: float | Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """The criterion, and its gradients times a scale, by what gives ⟨cotangent, f⟩'s gradients."""
    f = prediction.detach()
    cotangent = likelihood.gradient(f, targets).detach()  # of targets with a graph
    criterion = likelihood.criterion(f, targets).detach()
    cotangent = cotangent * scale  # a copy: it may come back as the gradient of a parameter
    return criterion, summed_gradients(gradients, cotangent, underflows)


def batch_slope(
    likelihood: Likelihood,
    prediction: Tensor,
    targets: Any,
    gradients: Callable[[Tensor], Sequence[Tensor | None]],
    underflows: bool,
) -> Slope:
    """Those of one batch, scaled by its own R."""
    scale = batch_scale(likelihood, prediction, targets, underflows)
    found = slope_of(likelihood, prediction, targets, gradients, underflows, scale)
    return Slope(*found, scale)


def may_scale(dtype: torch.dtype, underflows: bool) -> bool:
    """Whether a cotangent may be scaled: in half precision what is small gets lost."""
    return dtype in ACCURATE and not underflows


def batch_scale(likelihood: Likelihood, f: Tensor, targets: Any, underflows: bool) -> float:
    """R of a batch by itself; one where that is zero, so that it can be undone."""
    if not may_scale(f.dtype, underflows):
        return 1.0
    return scale_of(likelihood, count_of(likelihood, f.detach(), targets)) or 1.0


@dataclass
class SlopeSums:
    """Criterion and gradients of all batches so far.

    Attributes:
        criterion: Without R.
        gradients: Those that have arrived, at least in float32.
        scale: What they are multiplied by, as the first of them were.
    """

    criterion: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    def add(self, names: Iterable[str], slope: Slope) -> None:
        """Add those of one batch."""
        self.criterion = self.criterion + slope.criterion
        if not self.gradients:
            self.scale = slope.scale
        ratio = self.scale / slope.scale
        for name, g in zip(names, slope.gradients, strict=True):
            if g is not None:
                self.gradients[name] = _sum(self.gradients.get(name), g, ratio)

    def reduced(self, R: float, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the loss, each laid out as its parameter, in memory of its own.

        They are zeros where nothing arrived. What was added is used up.

        Raises:
            NonFiniteError: One holds NaN or Inf.
        """
        taken: set[int] = set()  # memory that one of them is in
        gradients = {
            name: _laid_out(self.gradients.pop(name, None), R / self.scale, parameter, taken)
            for name, parameter in parameters.items()
        }
        if (name := not_finite(gradients)) is not None:
            raise NonFiniteError(
                f"the gradient in {name!r} holds NaN or Inf; expected finite numbers. Look for an "
                "op without a slope at these data, as sqrt at zero; float16 ends at 65504."
            )
        return gradients


def _sum(total: Tensor | None, g: Tensor, factor: float) -> Tensor:
    """The total and the factor times g; neither is changed, as others may read their memory."""
    if total is None:
        return g if factor == 1.0 else g * factor
    return torch.add(total, g, alpha=factor)


def _laid_out(total: Tensor | None, factor: float, like: Tensor, taken: set[int]) -> Tensor:
    """The factor times a gradient; the gradient itself, where this is the same."""
    if total is None:
        return torch.zeros_like(like.detach())
    is_same = factor == 1.0 and total.dtype == like.dtype and total.stride() == like.stride()
    memory = total.untyped_storage()
    if is_same and memory.nbytes() == total.nbytes and memory.data_ptr() not in taken:
        taken.add(memory.data_ptr())
        return total
    return torch.mul(total, factor, out=torch.empty_like(like.detach()))
