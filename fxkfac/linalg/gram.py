"""Rows x -> Σ_rows x xᵀ for every group, added in place to a total.

By a kernel of our own where there is one (see `tiles`). Elsewhere only the lower triangle of a
total is kept up, and blocks on its diagonal; what lies above these is anything until all rows are
in.
Rows come as the views that they are, with whatever strides, and are copied only where no product
could read them, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.correlation import (
    IMAGE,
    add_by_channels,
    add_part,
    as_images,
    channel_block,
    is_faster,
)
from fxkfac.linalg.made_once import made_once
from fxkfac.linalg.tiles import Kernel, kernel_for

if TYPE_CHECKING:
    from jaxtyping import Float

# A triangle is taken in strips of columns, each from its diagonal block downwards; strips of rows
# take up to a third longer, and so do other widths, powers of two in float64 above all. In float32
# and in float64 it takes 0.5 to 0.9 of the time of the whole (few rows: as long).
STRIP = 96  # columns
WIDE = 512  # columns from which on strips are twice as wide
CHUNK = 2**19  # numbers that are copied at once: from 2**18 to 2**20 they stay in the cache
CHUNK_ELSEWHERE = 2**24  # on a device where every call costs more than a missed cache
LARGE, FEW_STRIPS = 2**33, 4  # there: multiply-adds of a square that is worth more calls than one
# What else takes time beside the products, in multiply-adds: measured for tens of channels and up.
READ = 8  # for every number that a product reads
COPY = 16  # for every number that is copied out of its order first
CALL = 2**18  # for every product, however small
TILE = 64  # columns that are transposed at once, at least: fewer take longer
LINE = 64  # bytes of memory that come together
CACHED = 2**21  # bytes of a sum that the second cache has
FEW = 192  # rows whose whole square takes no longer than its triangle and the mirror do


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
    is_finite: bool = field(default=True, init=False)

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

    def add(
        self, kernel: Kernel, x: Tensor, columns: int = 1, summed: bool = False
    ) -> Float[Tensor, "group d"] | None:
        """Add the products of rows by a kernel, which keeps up the whole and its scale.

        Returns Σ_rows x, too, if that is asked for.
        """
        adds = not self.is_empty
        if adds:
            self.matrix(self.scale)  # both triangles
        is_finite = self.is_finite
        added = kernel.add(self.total, x, columns, scale=self.scale, adds=adds, summed=summed)
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
    line = LINE // dtype.itemsize
    if like.device.type != "cpu" or d % line == 0 or d**2 * dtype.itemsize < CACHED:
        return like.new_empty(group, d, d, dtype=dtype)
    step = -(-d // line) * line
    return like.new_empty_strided((group, d, d), (d * step, step, 1), dtype=dtype)


def in_front(total: Float[Tensor, "group wider wider"], border: int) -> Float[Tensor, "group d d"]:
    """What is in front of so many last rows and columns."""
    if not border:
        return total
    group, d, _ = total.shape
    size = (group, d - border, d - border)
    return total.as_strided(size, total.stride(), total.storage_offset())


def add_gram(
    gram: Gram, x: Float[Tensor, "group *rows d"], summed: bool = False
) -> Float[Tensor, "group d"] | None:
    """Add Σ_rows x xᵀ, in place; and return Σ_rows x, if that is asked for.

    Args:
        gram: Where to.
        x: Rows in one axis, or in two: (group, batch, shared, d) of any strides.
        summed: Whether it is.
    """
    if kernel := kernel_for(gram.total, x):
        return gram.add(kernel, x, summed=summed)
    if x.numel():
        _add_by_products(gram, x)
    return x.sum(tuple(range(1, x.ndim - 1))) if summed else None


def _add_by_products(gram: Gram, x: Float[Tensor, "group *rows d"]) -> None:
    rows = x if x.ndim == 3 else _flat(x)
    if rows is not None and _readable(rows, gram.total):
        add_rows(gram, rows)
        return
    x = x.unsqueeze(2) if x.ndim == 3 else x
    d = x.shape[-1]
    # One product for every datum needs no copy, and is smaller than the datum.
    by_datum = d < x.shape[2] and strip(d) == d and _readable(x, gram.total)
    for part in _chunks(x, d * d):
        if by_datum:
            datum_first = part.movedim(1, 0)  # merges with the groups of a channel axis
            add_part(gram.total, (datum_first.mT @ datum_first).sum(0), gram.beta(d))
        else:
            add_rows(gram, _copied(part, gram.total.dtype))


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


def add_rows(gram: Gram, rows: Float[Tensor, "group rows d"]) -> None:
    """Add the products of rows that BLAS can read as they are."""
    number, d = rows.shape[1:]
    fast = rows.stride(-1) == 1 and is_faster(rows, d)
    if images := number // IMAGE * IMAGE if fast else 0:
        beta = gram.beta(channel_block(d))
        for t, x in zip(gram.total, rows, strict=True):
            add_by_channels(t.unsqueeze(0), as_images(x[:images]), beta)
        rows = rows[:, images:]
    if rows.shape[1]:
        width = _width(gram, number)
        _add_products(gram.total, rows, gram.beta(width), width)


def _add_products(total: Tensor, rows: Tensor, beta: float, width: int) -> None:
    """By matrix products: strips of columns, as long as the triangle has them."""
    d = rows.shape[-1]
    if width == d:
        if beta:
            total.baddbmm_(rows.mT, rows)
        else:
            torch.bmm(rows.mT, rows, out=total)
        return
    for t, x in zip(total.unbind(), rows.unbind(), strict=True):
        for start in range(0, d, width):
            columns = slice(start, start + width)
            _multiply(t[start:, columns], x[:, start:].mT, x[:, columns], beta)


def _multiply(total: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    if beta:
        total.addmm_(left, right)
    else:  # `addmm` of compiled code would read what is there
        torch.mm(left, right, out=total)


def _width(gram: Gram, rows: int) -> int:
    """How wide strips are that pay for so many rows; d is the whole square."""
    d = gram.total.shape[-1]
    if gram.total.device.type != "cpu":
        return -(-d // FEW_STRIPS) if rows * d**2 >= LARGE else d
    return d if gram.is_empty and rows <= FEW else strip(d)


def strip(d: int) -> int:
    """How wide the strips are that a CPU takes a triangle in; d is the whole square."""
    if d < 2 * STRIP:
        return d
    return STRIP if d < WIDE else 2 * STRIP


def triangle(d: int) -> float:
    """The part of a square's entries that the strips of its lower triangle have."""
    return (1 + strip(d) / max(d, 1)) / 2


def chunk_numel(device: torch.device) -> int:
    """The number of numbers to copy at once."""
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE


def _flat(x: Float[Tensor, "group batch shared d"]) -> Float[Tensor, "group rows d"] | None:
    """The same with all rows in one axis, where this needs no copy."""
    _, batch, shared, _ = x.shape
    if batch == 1 or x.numel() == 0:
        return x.flatten(1, 2) if x.numel() == 0 else x.squeeze(1)
    if shared == 1:
        return x.squeeze(2)
    return x.flatten(1, 2) if x.stride(1) == shared * x.stride(2) else None


def _readable(x: Float[Tensor, "*rows d"], total: Tensor) -> bool:
    """Whether BLAS reads the matrices of the last two axes, or their transposes, without a copy."""
    (rows, d), (down, right) = x.shape[-2:], x.stride()[-2:]
    row_major = right == 1 and down >= d
    return x.dtype == total.dtype and (row_major or (down == 1 and right >= rows))


def _chunks(
    x: Float[Tensor, "group batch shared d"], least: int
) -> Sequence[Float[Tensor, "group part shared d"]]:
    """Some data at a time: no more than the cache holds, or, if larger, than the total has."""
    numel = max(chunk_numel(x.device), least)
    datum = x.numel() // x.shape[1]
    return x.split(max(1, numel // datum), dim=1)


def _copied(
    x: Float[Tensor, "group batch shared d"], dtype: torch.dtype
) -> Float[Tensor, "group rows d"]:
    """The rows in one axis; what is dense stays dense, so that lines are copied whole."""
    if x.stride(-1) > x.stride(-2) > 0:
        return x.to(dtype).permute(0, 3, 1, 2).flatten(2).mT
    return x.to(dtype).flatten(1, 2).contiguous()
