"""Rows x -> Σ_rows x xᵀ for every group, added in place to a total, one triangle at a time.

Only the lower triangle of a total is kept up; what lies above it is anything until all rows are in.
Rows come as the views that they are, with whatever strides, and are copied only where no product
could read them, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.correlation import IMAGE, add_by_channels, add_part, as_images, is_faster

if TYPE_CHECKING:
    from jaxtyping import Float

# Narrower strips of a triangle take longer than what they spare: from two strips on, in float32 and
# in float64, the lower triangle takes 0.5 to 0.9 of the time of the whole (few rows: as long).
STRIP = 128
MOST_STRIPS = 8  # spare 7/16 of the product; more of them spare little and read all columns anew
CHUNK = 2**19  # numbers that are copied at once: from 2**18 to 2**20 they stay in the cache
CHUNK_ELSEWHERE = 2**24  # on a device where every call costs more than a missed cache
LARGE, FEW_STRIPS = 2**33, 4  # there: multiply-adds of a square that is worth more calls than one
# What else takes time beside the products, in multiply-adds: measured for tens of channels and up.
READ = 8  # for every number that a product reads
COPY = 16  # for every number that is copied out of its order first
CALL = 2**18  # for every product, however small
TILE, TILE_ELSEWHERE = 128, 4096  # columns that are transposed at once, likewise
FEW = 192  # rows whose whole square takes no longer than its triangle and the mirror do


@dataclass
class Gram:
    """Σ_rows x xᵀ for every group, of rows that are added one after the other.

    Attributes:
        total: The lower triangle of each; it may be a part of something larger.
        is_empty: Whether nothing was added: then the total holds anything, and is only written.
        is_whole: Whether the upper triangle was kept up, too.
    """

    total: Float[Tensor, "group d d"]
    is_empty: bool = True
    is_whole: bool = True

    def merge(self, other: Gram) -> None:
        """Add what another one has, which is used up."""
        if not other.is_empty:
            add_part(self.total, other.total, self.beta(other.is_whole))

    def matrix(self) -> Float[Tensor, "group d d"]:
        """The sum, symmetric to rounding."""
        if self.is_empty:
            self.total.zero_()
        elif not self.is_whole:
            _mirror(self.total)
        self.is_empty, self.is_whole = False, True
        return self.total

    def beta(self, whole: bool = False) -> float:
        """What a product multiplies the total by that comes next, with its upper triangle or not.

        The total is no longer empty then.
        """
        beta = 0.0 if self.is_empty else 1.0
        self.is_empty, self.is_whole = False, self.is_whole and whole
        return beta


def add_gram(gram: Gram, x: Float[Tensor, "group *rows d"]) -> None:
    """Add Σ_rows x xᵀ, in place.

    Args:
        gram: Where to.
        x: Rows in one axis, or in two: (group, batch, shared, d) of any strides.
    """
    if x.ndim == 3:
        x = x.unsqueeze(2)
    if not x.numel():
        return
    rows = _flat(x)
    if rows is not None and _readable(rows, gram.total):
        add_rows(gram, rows)
        return
    d = x.shape[-1]
    # One product for every datum needs no copy, and is smaller than the datum.
    by_datum = d < x.shape[2] and strips(d) == 1 and _readable(x, gram.total)
    for part in _chunks(x, d * d):
        if by_datum:
            datum_first = part.movedim(1, 0)  # merges with the groups of a channel axis
            add_part(gram.total, (datum_first.mT @ datum_first).sum(0), gram.beta(whole=True))
        else:
            add_rows(gram, _copied(part, gram.total.dtype))


def _mirror(total: Float[Tensor, "group d d"]) -> None:
    """Put the lower triangle in the place of the upper one, too."""
    d = total.shape[-1]
    tile = TILE if total.device.type == "cpu" else TILE_ELSEWHERE
    for start in range(0, d, tile):
        new = slice(start, min(start + tile, d))
        if start:
            total[:, :start, new] = total[:, new, :start].mT
        corner = total[:, new, new]
        corner.copy_(torch.where(_lower(new.stop - start, total.device), corner, corner.mT))


@lru_cache(maxsize=256)  # the same for every factor
def _lower(d: int, device: torch.device) -> Tensor:
    return torch.ones(d, d, dtype=torch.bool, device=device).tril_()


def add_rows(gram: Gram, rows: Float[Tensor, "group rows d"]) -> None:
    """Add the products of rows that BLAS can read as they are."""
    number, d = rows.shape[1:]
    fast = rows.stride(-1) == 1 and is_faster(rows, d)
    if images := number // IMAGE * IMAGE if fast else 0:
        beta = gram.beta(whole=False)
        for t, x in zip(gram.total, rows, strict=True):
            add_by_channels(t.unsqueeze(0), as_images(x[:images]), beta)
        rows = rows[:, images:]
    if rows.shape[1]:
        pieces = _pieces(gram, number)
        _add_products(gram.total, rows, gram.beta(whole=pieces == 1), pieces)


def _add_products(total: Tensor, rows: Tensor, beta: float, number: int) -> None:
    """By matrix products: strips of rows, as long as the triangle has them."""
    group, _, d = rows.shape
    if number == 1:
        if group == 1:
            _multiply(total[0], rows[0].mT, rows[0], beta)
        elif beta:
            total.baddbmm_(rows.mT, rows)
        else:
            torch.bmm(rows.mT, rows, out=total)
        return
    width = max(1, -(-d // number))
    for t, x in zip(total.unbind(), rows.unbind(), strict=True):
        for start in range(0, d, width):
            strip, end = slice(start, start + width), min(start + width, d)
            _multiply(t[strip, :end], x[:, strip].mT, x[:, :end], beta)


def _multiply(total: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    if beta:
        total.addmm_(left, right)
    else:  # `addmm` of compiled code would read what is there
        torch.mm(left, right, out=total)


def _pieces(gram: Gram, rows: int) -> int:
    """The number of strips that pay for so many rows; one is the whole square."""
    d = gram.total.shape[-1]
    if gram.total.device.type != "cpu":
        return FEW_STRIPS if rows * d**2 >= LARGE else 1
    return 1 if gram.is_empty and rows <= FEW else strips(d)


def strips(d: int) -> int:
    """The number of strips that a CPU takes a triangle in; one is the whole square."""
    return max(1, min(MOST_STRIPS, d // STRIP))


def triangle(d: int) -> float:
    """The part of a square's entries that the strips of its lower triangle have."""
    return (1 + 1 / strips(d)) / 2


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
) -> Iterator[Float[Tensor, "group part shared d"]]:
    """Some data at a time: no more than the cache holds, or, if larger, than the total has."""
    numel = max(chunk_numel(x.device), least)
    datum = max(1, x[:, :1].numel())
    yield from x.split(max(1, numel // datum), dim=1)


def _copied(
    x: Float[Tensor, "group batch shared d"], dtype: torch.dtype
) -> Float[Tensor, "group rows d"]:
    """The rows in one axis; what is dense stays dense, so that lines are copied whole."""
    if x.stride(-1) > x.stride(-2) > 0:
        return rearrange(x.to(dtype), "g n s d -> g d (n s)").mT
    return x.to(dtype).flatten(1, 2).contiguous()
