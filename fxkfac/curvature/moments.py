"""Rows -> Σ x xᵀ, summed as they come along: over uses, backpropagated vectors and batches.

A sum of products costs a pass over d² numbers, however few the rows. So few rows wait until there
are enough of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.images import Image
from fxkfac.curvature.plan import Scales
from fxkfac.linalg import add_gram, add_patch_gram, mirrored, patch_sums

if TYPE_CHECKING:
    from jaxtyping import Float

ENOUGH = 512  # rows: then their product takes longer than reading and writing the sum


@dataclass
class Moment:
    """Σ_rows x xᵀ, of rows that are added one after the other.

    Attributes:
        with_sums: Whether Σ_rows x is wanted, too.
        gram: The lower triangle of the sum so far, (group, d, d), `None` before the first product.
        sums: Σ_rows x of the same rows, (group, d).
        count: Number of all rows; (group,) where groups have rows of their own.
    """

    with_sums: bool = False
    gram: Tensor | None = None
    sums: Tensor | None = None
    count: int | Tensor = 0
    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, x: Float[Tensor, "group *rows d"], count: int | Tensor = 0) -> None:
        """Add rows; `count` says how many of them count."""
        self.count = self.count + count
        if x.shape[1:-1].numel() >= ENOUGH:
            self._multiply(x)
            return
        self._waiting.append(_alone(x.flatten(1, -2)))
        if sum(w.shape[1] for w in self._waiting) >= ENOUGH:
            self._flush()

    def add_image(self, of: Image, count: int | Tensor = 0) -> None:
        """Add rows that are the patches of an image."""
        self.count = self.count + count
        self.gram = add_patch_gram(self.gram, of.image, of.windows)
        if self.with_sums:
            total = of.image.sum(0, keepdim=True)
            self.sums = _plus(self.sums, patch_sums(total, of.windows)[0])

    def add_product(self, gram: Tensor, sums: Tensor | None, count: int | Tensor) -> None:
        """Add a sum of products that is known."""
        self.count = self.count + count
        self.gram = _plus(self.gram, gram)
        self.sums = _plus(self.sums, sums)

    def merge(self, other: Moment) -> None:
        """Add what another one has; the other one is used up."""
        self.count = self.count + other.count
        self.gram, self.sums = _plus(self.gram, other.gram), _plus(self.sums, other.sums)
        self._waiting += other._waiting
        if sum(w.shape[1] for w in self._waiting) >= ENOUGH:
            self._flush()

    def matrix(self) -> Float[Tensor, "group d d"] | None:
        """Σ_rows x xᵀ; `None` where there were no rows."""
        self._flush()
        return None if self.gram is None else mirrored(self.gram)

    def numbers(self) -> list[Tensor]:
        """Tensors whose norm is NaN or Inf if the sum holds one."""
        diagonal = [] if self.gram is None else [self.gram.diagonal(dim1=1, dim2=2)]
        return [*self._waiting, *diagonal]  # any row shows on the diagonal, which sums squares

    def is_finite(self) -> bool:
        """Whether the sum holds neither NaN nor Inf."""
        squares = [rows.square().sum() for rows in self._waiting]
        diagonal = [] if self.gram is None else [self.gram.diagonal(dim1=1, dim2=2)]
        return all(bool(t.isfinite().all()) for t in (*squares, *diagonal))

    def _flush(self) -> None:
        if self._waiting:
            rows = self._waiting
            self._waiting = []
            self._multiply(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))

    def _multiply(self, x: Tensor) -> None:
        self.gram = add_gram(self.gram, x.flatten(2, -2) if x.ndim > 4 else x)
        if self.with_sums:
            self.sums = _plus(self.sums, x.sum(tuple(range(1, x.ndim - 1))))


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def _alone(rows: Tensor) -> Tensor:
    """Rows that wait keep no larger tensor alive than themselves."""
    held = rows.untyped_storage().nbytes()
    return rows if held <= 2 * rows.numel() * rows.element_size() else rows.clone()


@dataclass
class InputSums:
    """What A is made of: Σ x̃ x̃ᵀ of one term.

    Attributes:
        moments: The rows x, by what the biases that have joined are multiplied by at them: the
            rest of x̃, which is the same for all of these rows.
        counts: In the place of moments, how often each one-hot row occurs.
        rows: Number of rows; (group,) where groups have rows of their own.
    """

    moments: dict[Scales, Moment] = field(default_factory=dict)
    counts: Tensor | None = None
    rows: int | Tensor = 0

    def of(self, scales: Scales) -> Moment:
        """The moment of rows with these scales."""
        return self.moments.setdefault(scales, Moment(with_sums=bool(scales)))

    def merge(self, other: InputSums) -> None:
        """Add what another one has; the other one is used up."""
        for scales, moment in other.moments.items():
            self.of(scales).merge(moment)
        self.counts = _plus(self.counts, other.counts)
        self.rows = self.rows + other.rows

    def matrix(self) -> Float[Tensor, "group d d"]:
        """Σ x̃ x̃ᵀ."""
        total: Tensor | None = None
        for scales, moment in self.moments.items():
            total = _plus(total, _bordered(moment, scales))
        assert total is not None
        return total

    def numbers(self) -> list[Tensor]:
        """Tensors whose norm is NaN or Inf if the sum holds one."""
        return [t for moment in self.moments.values() for t in moment.numbers()]

    def is_finite(self) -> bool:
        """Whether the sum holds neither NaN nor Inf."""
        return all(moment.is_finite() for moment in self.moments.values())


def _bordered(moment: Moment, scales: Scales) -> Tensor:
    """Σ x̃ x̃ᵀ with x̃ = (x, scales), from Σ x xᵀ, Σ x and the number of rows."""
    gram = moment.matrix()
    assert gram is not None
    if not scales:
        return gram
    assert moment.sums is not None
    c, d = gram.new_tensor(scales), gram.shape[-1]
    full = gram.new_empty(len(gram), d + len(c), d + len(c))
    full[:, :d, :d] = gram
    border = moment.sums.unsqueeze(-1) * c
    full[:, :d, d:] = border
    full[:, d:, :d] = border.mT
    count = torch.as_tensor(moment.count, dtype=gram.dtype, device=gram.device)
    full[:, d:, d:] = count.view(-1, 1, 1) * c.outer(c)
    return full
