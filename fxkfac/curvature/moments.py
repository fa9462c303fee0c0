"""Rows -> Σ x xᵀ, summed as they come along: over uses, backpropagated vectors and batches.

A sum of products costs a pass over d² numbers, however few the rows. So on a CPU few rows wait
until there are enough of them; on a GPU a copy takes as long as a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.images import Image
from fxkfac.curvature.plan import Scales
from fxkfac.linalg import Gram, add_gram, add_patch_gram, in_front, new_total, patch_sums
from fxkfac.precision import accurate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

ENOUGH = 512  # rows: then their product takes longer than reading and writing the sum


@dataclass
class Moment:
    """Σ_rows x̃ x̃ᵀ with x̃ = (x, scales), of rows x that are added one after the other.

    Attributes:
        scales: The rest of x̃, the same for all rows.
        total: Room for the sum, (group, d, d), `None` before the first product.
        gram: The part of it that is Σ x xᵀ.
        sums: Σ_rows x of the same rows, (group, d), if there is a rest.
        count: Number of all rows; (group,) where groups have rows of their own.
        waiting: Rows, (group, rows, d), that are not in the sum yet.
        scale: What the sum is multiplied by on its way, where that costs nothing; `None` for one
            over the number of its first rows, or of images whose patches are an input.
    """

    scales: Scales = ()
    total: Tensor | None = None
    gram: Gram | None = None
    sums: Tensor | None = None
    count: int | Tensor = 0
    waiting: list[Tensor] = field(default_factory=list)
    scale: float | None = None
    _waits: int = field(default=0, init=False)  # how many rows do, not counted anew each time

    def __post_init__(self) -> None:
        for rows in self.waiting:
            self._waits += rows.shape[1]

    @staticmethod
    def of(total: Float[Tensor, "group d d"]) -> Moment:
        """A sum that is there: of x̃ as rows, without a rest."""
        return Moment(total=total, gram=Gram(total, is_empty=False))

    def add(self, x: Float[Tensor, "group *rows d"], count: int | Tensor = 0) -> None:
        """Add rows; `count` says how many of them count."""
        self.count = self.count + count
        if not x.is_cpu or x.shape[1:-1].numel() >= ENOUGH:
            self._multiply(x)
            return
        # A copy: a larger tensor would stay alive, and the user's own may change.
        self._wait((x if x.ndim == 3 else x.flatten(1, -2)).clone())

    def add_image(self, of: Image, count: int = 0) -> None:
        """Add rows that are the patches of an image; `count` says how many of an input count."""
        self.count = self.count + count
        # Of inputs they are over the number of data, as most losses say, and else over their own.
        self.add_patch_products(of, len(of.image) if count else of.rows)
        if self.scales:
            total = of.image.sum(0, keepdim=True)
            self.sums = _plus(self.sums, patch_sums(total, of.windows)[0])

    def merge(self, other: Moment) -> None:
        """Add what another one has; the other one is used up."""
        self.count = self.count + other.count
        if self.gram is None:
            self.total, self.gram = other.total, other.gram
        elif other.gram is not None:
            self.gram.merge(other.gram)
        self.sums = _plus(self.sums, other.sums)
        for rows in other.waiting:
            self._wait(rows)

    def matrix(self, scale: float | Tensor = 1.0) -> Float[Tensor, "group d d"] | None:
        """Σ_rows x̃ x̃ᵀ, `None` where there were no rows; scaled, it is used up."""
        self._flush()
        if self.total is None or self.gram is None:
            return None
        d = self.gram.matrix(scale).shape[-1]
        for k, c in enumerate(self.scales, start=d):
            assert self.sums is not None
            border = torch.mul(self.sums, c * scale, out=self._line(k, 0, 2, d))
            self._line(0, k, 1, d).copy_(border)
            for m, e in enumerate(self.scales, start=d):
                corner, number = self._line(k, m, 2, 1), c * e * scale * self.count
                if isinstance(number, Tensor):
                    corner.copy_(number.unsqueeze(-1))
                else:
                    corner.fill_(number)
        return self.total

    def _line(self, row: int, column: int, axis: int, d: int) -> Float[Tensor, "group d"]:
        """The numbers of the sum from one place on, along an axis; one call in the place of two."""
        assert self.total is not None
        steps = self.total.stride()
        start = self.total.storage_offset() + row * steps[1] + column * steps[2]
        return self.total.as_strided((self.total.shape[0], d), (steps[0], steps[axis]), start)

    def cleared(self) -> Float[Tensor, "group d d"]:
        """The memory of the sum, with zeros in the place of what was never written there."""
        assert self.total is not None
        assert self.gram is not None
        d = self.gram.total.shape[-1]
        self.total[:, d:] = self.total[:, :, d:] = 0.0  # the border comes last
        if self.gram.is_empty:
            self.total.zero_()
        else:
            self.gram.matrix(self.gram.scale)
        return self.total

    def numbers(self) -> list[Tensor]:
        """Tensors whose norm is NaN or Inf if the sum holds one."""
        return [*self.waiting, *self._diagonals()]

    def is_finite(self) -> bool:
        """Whether the sum holds neither NaN nor Inf."""
        squares = [rows.square().sum() for rows in self.waiting]
        return all(bool(t.isfinite().all()) for t in (*squares, *self._diagonals()))

    def _diagonals(self) -> list[Tensor]:
        return [] if self.gram is None else self.gram.numbers()

    def _wait(self, rows: Tensor) -> None:
        self.waiting.append(rows)
        self._waits += rows.shape[1]
        if self._waits >= ENOUGH:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            rows = self.waiting
            self.waiting, self._waits = [], 0
            self._multiply(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))

    def _multiply(self, x: Tensor) -> None:
        sums = self.add_products(x.flatten(2, -2) if x.ndim > 4 else x)
        if sums is not None:
            self.sums = _plus(self.sums, sums)

    def add_products(self, x: Float[Tensor, "group *rows d"]) -> Float[Tensor, "group d"] | None:
        """Add Σ x xᵀ of rows in one axis or in two; return Σ x, if there is a rest."""
        scale = self.likely_scale(x.shape[1:-1].numel())
        return add_gram(self.room(x.shape[0], x.shape[-1], x, scale), x, bool(self.scales))

    def add_patch_products(self, of: Image, likely: int) -> None:
        """Add that of an image's patches, which will be over so many, as is likely."""
        groups = of.windows.groups
        d = of.image.shape[1] // groups * math.prod(of.windows.kernel)
        room = self.room(groups, d, of.image, self.likely_scale(likely))
        add_patch_gram(room, of.image, of.windows)

    def likely_scale(self, rows: int) -> float:
        """What sums that begin with so many rows are multiplied by."""
        return 1 / max(rows, 1) if self.scale is None else self.scale

    def room(self, groups: int, d: int, like: Tensor, scale: float = 1.0) -> Gram:
        """The sum, made where there was none: of no rows yet."""
        if self.gram is None:
            size = d + len(self.scales)
            self.total = new_total(like, groups, size, accurate_dtype(like))
            self.gram = Gram(in_front(self.total, len(self.scales)), scale=scale)
        return self.gram


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


@dataclass
class InputSums:
    """What A is made of: Σ x̃ x̃ᵀ of one term.

    Attributes:
        moments: The rows x, by what the biases that have joined are multiplied by at them: the
            rest of x̃, which is the same for all of these rows.
        counts: In the place of moments, how often each one-hot row occurs.
        rows: Number of rows; (group,) where groups have rows of their own.
        moment: In what rows are summed.
    """

    moments: dict[Scales, Moment] = field(default_factory=dict)
    counts: Tensor | None = None
    rows: int | Tensor = 0
    moment: Callable[[Scales], Moment] = Moment

    def of(self, scales: Scales) -> Moment:
        """The moment of rows with these scales."""
        found = self.moments.get(scales)
        if found is None:
            found = self.moments[scales] = self.moment(scales)
        return found

    def merge(self, other: InputSums) -> None:
        """Add what another one has; the other one is used up."""
        for scales, moment in other.moments.items():
            self.of(scales).merge(moment)
        self.counts = _plus(self.counts, other.counts)
        self.rows = self.rows + other.rows

    def matrix(self, scale: float = 1.0) -> Float[Tensor, "group d d"]:
        """Σ x̃ x̃ᵀ, its diagonal for one-hot rows; scaled, it is used up."""
        if self.counts is not None:
            return self.counts if scale == 1.0 else self.counts.mul_(scale)
        total: Tensor | None = None
        for moment in self.moments.values():
            total = _plus(total, moment.matrix(scale))
        assert total is not None
        return total

    def numbers(self) -> list[Tensor]:
        """Tensors whose norm is NaN or Inf if the sum holds one."""
        return [t for moment in self.moments.values() for t in moment.numbers()]

    def is_finite(self) -> bool:
        """Whether the sum holds neither NaN nor Inf."""
        return all(moment.is_finite() for moment in self.moments.values())
