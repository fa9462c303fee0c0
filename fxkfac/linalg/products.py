"""Rows x -> Σ_rows x xᵀ for every group, added in place to a sum.

By a kernel of our own where there is one (see `tiles`). Elsewhere only the lower triangle of a
total is kept up, and blocks on its diagonal; what lies above these is anything until all rows are
in.
Rows come as the views that they are, with whatever strides, and are copied only where no product
could read them, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.tiles import kernel_for

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
FEW = 192  # rows whose whole square takes no longer than its triangle and the mirror do


def add_gram(
    gram: Gram, x: Float[Tensor, "group *rows d"], summed: bool = False
) -> Float[Tensor, "group d"] | None:
    """Add Σ_rows x xᵀ, in place; and return Σ_rows x, if that is asked for.

    Args:
        gram: Where to.
        x: Rows in one axis, or in two: (group, batch, shared, d) of any strides.
        summed: Whether it is.
    """
    if kernel := kernel_for(gram.total, x, x.shape[1:-1].numel()):
        return gram.add(partial(kernel.add, x=x, summed=summed))
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
