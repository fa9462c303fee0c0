"""The sum Σ_rows x xᵀ of every group, and what is known of it while rows are added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.correlation import add_part
from fxkfac.linalg.made_once import made_once
from fxkfac.linalg.tiles import Added

if TYPE_CHECKING:
    from jaxtyping import Float

TILE = 64  # columns that are transposed at once, at least: fewer take longer
LINE = 64  # bytes of memory that come together
CACHED = 2**19  # bytes of a sum that may stay in the second cache, as the kernel has it


@dataclass
class Gram:
    """Σ_rows x xᵀ for every group, of rows that are added one after the other.

    Attributes:
        total: The lower triangle of each; it may be a part of something larger.
        is_empty: Whether nothing was added: then the total holds anything, and is only written.
        whole: Width of the blocks on the diagonal whose upper triangle was kept up, too; d if the
            whole of it was.
        scale: What the total was multiplied by already. A kernel writes an empty one multiplied by
            it; products of PyTorch's are not, and set it to one.
        is_finite: Whether it is known that no row had NaN or Inf.
    """

    total: Float[Tensor, "group d d"]
    is_empty: bool = True
    whole: int = 0  # of nothing: all of it
    scale: float = 1.0
    is_finite: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_finite = self.is_empty
        self.whole = self.whole or self.total.shape[-1]

    def merge(self, other: Gram) -> None:
        """Add what another one has, which is used up."""
        if other.is_empty:
            return
        if self.is_empty:
            self.scale = other.scale
        elif self.scale != other.scale:
            other.total.mul_(self.scale / other.scale)
        add_part(self.total, other.total, self._beta(other.whole))

    def add(self, put: Callable[[Tensor, float, bool], Added]) -> Float[Tensor, "group d"] | None:
        """Add products by a kernel, which keeps up the whole and its scale.

        Returns Σ_rows x, too, if that was asked for.

        Args:
            put: Writes the products into the total, multiplied by the scale, or adds them.
        """
        adds = not self.is_empty
        if adds:
            self.matrix(self.scale)  # both triangles
        is_finite = self.is_finite
        added = put(self.total, self.scale, adds)
        self._beta(self.total.shape[-1])
        self.is_finite = is_finite and added.are_finite
        return added.sums

    def matrix(self, scale: float | Tensor = 1.0) -> Float[Tensor, "group d d"]:
        """The sum, symmetric to rounding; scaled in place by one number, or (group, 1, 1).

        By several numbers it is used up.
        """
        if self.is_empty:
            self.total.zero_()
        else:
            _mirror(self.total, self.whole, scale / self.scale)
        self.is_empty, self.whole = False, self.total.shape[-1]
        self.scale = 1.0 if isinstance(scale, Tensor) else scale
        return self.total

    def numbers(self) -> list[Tensor]:
        """Where NaN or Inf of any row shows, if there may be some: on the diagonal are squares."""
        return [] if self.is_finite else [self._diagonal()]

    def _diagonal(self) -> Float[Tensor, " group_d"]:
        """The diagonals, one after the other."""
        total = self.total
        if len(total) == 1:  # one call in the place of two
            step = total.stride(1) + total.stride(2)
            return total.as_strided((total.shape[1],), (step,), total.storage_offset())
        return total.diagonal(dim1=1, dim2=2).flatten()

    def beta(self, whole: int) -> float:
        """What a product multiplies the total by that comes next, which has such whole blocks.

        The total is no longer empty then, and not scaled.
        """
        if self.scale != 1.0 and not self.is_empty:
            self.total.div_(self.scale)
        self.scale = 1.0
        return self._beta(whole)

    def _beta(self, whole: int) -> float:
        beta = 0.0 if self.is_empty else 1.0
        d = self.total.shape[-1]
        self.is_empty = self.is_finite = False
        self.whole = min(self.whole, whole) if d in (self.whole, whole) else gcd(self.whole, whole)
        return beta


def new_total(like: Tensor, group: int, d: int, dtype: torch.dtype) -> Float[Tensor, "group d d"]:
    """Room for sums, of anything so far.

    In the memory of a CPU the rows of large ones begin where its lines do, so that a kernel writes
    them past the cache; there are up to 60 unused bytes between them.
    """
    size = dtype.itemsize
    if d * d * size < CACHED or d * size % LINE == 0 or not like.is_cpu:
        return like.new_empty(group, d, d, dtype=dtype)
    step = -(-d * size // LINE) * LINE // size
    return like.new_empty_strided((group, d, d), (d * step, step, 1), dtype=dtype)


def in_front(total: Float[Tensor, "group wider wider"], border: int) -> Float[Tensor, "group d d"]:
    """What is in front of so many last rows and columns."""
    if not border:
        return total
    group, d, _ = total.shape
    size = (group, d - border, d - border)
    return total.as_strided(size, total.stride(), total.storage_offset())


def _mirror(total: Float[Tensor, "group d d"], whole: int, scale: float | Tensor) -> None:
    """Scale the lower triangle and put it above, too, but for blocks on the diagonal."""
    d = total.shape[-1]
    if whole == d:
        if isinstance(scale, Tensor) or scale != 1.0:
            total.mul_(scale)
        return
    tile = max(whole, min(TILE, d))
    for start in range(0, d, tile):
        new = slice(start, min(start + tile, d))
        if isinstance(scale, Tensor) or scale != 1.0:  # while it is in the cache
            total[:, new, : new.stop].mul_(scale)
        if start:
            total[:, :start, new] = total[:, new, :start].mT
        if tile > whole:
            corner = total[:, new, new]
            corner.copy_(torch.where(_lower(new.stop - start, total.device), corner, corner.mT))


@made_once  # the same for every factor
def _lower(d: int, device: torch.device) -> Tensor:
    return torch.ones(d, d, dtype=torch.bool, device=device).tril_()
