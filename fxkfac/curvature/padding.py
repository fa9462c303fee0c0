"""Rows that are padding: left out of A, of B and of the counts, where the user says which they are.

A mask (N, T) says which of the T positions of each datum are real. It is laid over every use whose
one shared axis has T places; uses with other rows, such as a class token's or a pooled one's, keep
all of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxkfac.errors import DataError
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import normal_y
from fxkfac.graph.program import Run

if TYPE_CHECKING:
    from jaxtyping import Float

# The keyword of an input, or (inputs, targets) -> mask.
Mask = str | Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Padding:
    """The positions of one batch that are real, and the rows of the uses that they are.

    Attributes:
        mask: Of shape (N, T), `None` where nothing is padding.
    """

    mask: Tensor | None = None

    def real(self, use: Use, y: Tensor) -> Float[Tensor, "batch shared"] | None:
        """Ones where a row of the use is real, zeros where not; `None` where all are kept.

        Args:
            use: The use.
            y: Its output, as tapped.
        """
        if self.mask is None or use.batch is None or use.is_bias:
            return None
        rows = normal_y(use, y, use.batch).shape[1:3]
        return self.mask.to(y.dtype) if rows == self.mask.shape else None


def padding_of(mask: Mask | None, inputs: Any, targets: Tensor, run: Run) -> Padding:
    """Read the mask of one batch.

    Raises:
        DataError: There is no such input, the mask is not (N, T), or no use has rows like it.
    """
    if mask is None:
        return Padding()
    if isinstance(mask, str):
        if not isinstance(inputs, Mapping) or mask not in inputs:
            raise DataError(f"mask={mask!r}, but no input has this keyword; pass a function.")
        found = inputs[mask]
    else:
        found = mask(inputs, targets)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != run.n:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"the mask is {shape}; expected a tensor (N, T) with N = {run.n}.")
    padding = Padding(found.to(torch.bool))
    uses = run.tapped.uses
    if all(padding.real(u, run.taps[u.tap]) is None for u in uses):
        raise DataError(
            f"no use has rows like the mask {tuple(found.shape)}: one shared axis of "
            f"{found.shape[1]} places. Leave the mask out."
        )
    return padding
