"""Rows that are padding: left out of A, of B and of the counts.

A mask (N, T) says which of the T positions of each datum are real. It is laid over every use whose
one shared axis has T places, or whose first one has: then a position has several rows, as one for
each head. Uses with other rows, such as a class token's, a pooled one's, a routed expert's or one
step's of a recurrence, keep all of theirs. Without a mask, padding is what no term of the loss can
see: positions whose target is ignored, in the rows of uses at which no gradient arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxkfac.curvature.diagonal import by_datum
from fxkfac.errors import DataError, OptionError
from fxkfac.graph.experiments.by_values import has_size_of_values
from fxkfac.graph.tapped import Run, Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import normal_y
from fxkfac.likelihoods.base import Likelihood

if TYPE_CHECKING:
    from jaxtyping import Float

# The keyword of an input, or (inputs, targets) -> mask.
Mask = str | Callable[[Any, Tensor], Tensor]


@dataclass
class Padding:
    """The positions of one batch that are real, and the rows of the uses that they are.

    Attributes:
        mask: Positions that are real, (N, T); `None` where the user gives no mask.
        ignored: Positions whose target the loss ignores, (N, T), if there are any.
        seen: For every use, the rows at which a gradient has arrived.
        chosen: Names of ops whose rows values of the data have chosen: they are no positions,
            though there may be as many.
        fits: Whether there is a use whose rows are the positions.
    """

    mask: Tensor | None = None
    ignored: Tensor | None = None
    chosen: frozenset[str] = frozenset()
    seen: dict[Use, Tensor] = field(default_factory=dict)
    fits: bool = False

    def real(self, use: Use, y: Tensor) -> Float[Tensor, "batch shared"] | None:
        """Ones where a row of the use is real, zeros where not; `None` where all are kept.

        Args:
            use: The use.
            y: Its output, as tapped.
        """
        if self.mask is not None:
            rows = self._of_rows(use, y, self.mask)
            self.fits |= rows is not None
            return None if rows is None else rows.to(y.dtype)
        if self.ignored is None or use not in self.seen:
            return None
        ignored = self._of_rows(use, y, self.ignored)
        assert ignored is not None, "what was seen has rows like the positions"
        return (self.seen[use] | ~ignored).to(y.dtype)

    def require_fit(self) -> None:
        """Raise `DataError` unless there was a use whose rows are those of the mask."""
        if self.mask is not None and not self.fits:
            raise DataError(
                f"no use has rows like the mask {tuple(self.mask.shape)}: one shared axis, or a "
                f"first one, of {self.mask.shape[1]} places. Leave the mask out."
            )

    def look(self, use: Use, gradient: Tensor) -> None:
        """Remember at which rows a gradient arrives.

        An ignored target alone does not make a row padding: the beginning of a sequence may have
        none, and yet all that comes after it depends on it.
        """
        if self.ignored is not None and self._of_rows(use, gradient, self.ignored) is not None:
            rows = (normal_y(use, gradient, use.batch) != 0).any(-1).any(0)
            self.seen[use] = self.seen[use] | rows if use in self.seen else rows

    def _of_rows(self, use: Use, y: Tensor, positions: Tensor) -> Tensor | None:
        """What is said of positions, of the rows of a use; `None` where these are others.

        As far as their number tells: there are as many, or as many along the first shared axis.
        """
        if use.batch is None or use.is_bias or use.node in self.chosen:
            return None
        n, length = positions.shape
        data, rows = normal_y(use, y, use.batch).shape[1:3]
        if data != n:
            return None
        if rows == length:
            return positions
        first, *_ = use.form.shared_lengths(y.shape, use.batch) or [1]
        return positions.repeat_interleave(rows // length, 1) if first == length else None


def chosen_by_values(tapped: Tapped) -> frozenset[str]:
    """Names of the ops whose number of rows is up to values of the data, as an expert's."""
    if not tapped.by_values:
        return frozenset()
    nodes = tapped.captured.module.graph.nodes
    return tapped.once("chosen", lambda: frozenset(n.name for n in nodes if has_size_of_values(n)))


def ignored_positions(likelihood: Likelihood, run: Run, targets: Tensor) -> Tensor | None:
    """Positions that the loss ignores, as by `ignore_index`, (N, T), if there are any."""
    found = likelihood.ignored(run.prediction.detach(), targets)
    if found is None or run.tapped.prediction is None:
        return None
    return by_datum(run, found)


def require_mask(mask: Mask | None) -> None:
    """Raise `OptionError` unless it is a keyword or a function, or none."""
    if not (mask is None or isinstance(mask, str) or callable(mask)):
        raise OptionError(
            f"mask is of type {type(mask).__name__}; expected the keyword of an input, or a "
            "function of (inputs, targets), which is called for every batch."
        )


def read_mask(mask: Mask, inputs: Any, targets: Tensor, n: int) -> Tensor:
    """The positions of one batch that are real, (N, T).

    Raises:
        DataError: There is no such input, or the mask is not (N, T).
    """
    if isinstance(mask, str):
        if not isinstance(inputs, Mapping) or mask not in inputs:
            raise DataError(f"mask={mask!r}, but no input has this keyword; pass a function.")
        found = inputs[mask]
    else:
        found = mask(inputs, targets)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != n:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"the mask is {shape}; expected a tensor (N, T) with N = {n}.")
    return found.to(torch.bool)
