"""Rows x -> Σ_rows x xᵀ for every group, added in place to a total, one triangle at a time.

Only the lower triangle of a total is kept up; what lies above it is anything until `mirrored`, once
all rows are in, makes it the lower one's transpose. Rows come as the views that they are, with
whatever strides, and are copied only where no product could read them, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.correlation import IMAGE, add_by_channels, as_images, is_faster

if TYPE_CHECKING:
    from jaxtyping import Float

# Narrower strips of a triangle take longer than what they spare: from two strips on, in float32 and
# in float64, the lower triangle takes 0.5 to 0.9 of the time of the whole (few rows: as long).
STRIP = 128
MOST_STRIPS = 8  # spare 7/16 of the product; more of them spare little and read all columns anew
CHUNK = 2**19  # numbers that are copied at once: from 2**18 to 2**20 they stay in the cache
CHUNK_ELSEWHERE = 2**24  # on a device where every call costs more than a missed cache
# What else takes time beside the products, in multiply-adds: measured for tens of channels and up.
READ = 8  # for every number that a product reads
COPY = 16  # for every number that is copied out of its order first
CALL = 2**18  # for every product, however small
TILE = 128  # columns that are transposed at once, for the cache as well


def add_gram(
    total: Float[Tensor, "group d d"] | None, x: Float[Tensor, "group *rows d"]
) -> Float[Tensor, "group d d"]:
    """Add Σ_rows x xᵀ to the lower triangle of a total, in place.

    Args:
        total: Where to; it may be a part of something larger. `None` for a new one, which has
            float32 or better. Products are taken in its dtype.
        x: Rows in one axis, or in two: (group, batch, shared, d) of any strides.

    Returns:
        The total.
    """
    if x.ndim == 3:
        x = x.unsqueeze(2)
    group, d = len(x), x.shape[-1]
    if total is None:
        total = x.new_zeros(group, d, d, dtype=torch.promote_types(x.dtype, torch.float32))
    rows = _flat(x)
    if rows is not None and _readable(rows, total):
        add_rows(total, rows)
        return total
    # One product for every datum needs no copy, and is smaller than the datum.
    by_datum = d < x.shape[2] and strips(d) == 1 and _readable(x, total)
    for part in _chunks(x, d * d):
        if by_datum:
            datum_first = part.movedim(1, 0)  # merges with the groups of a channel axis
            total += (datum_first.mT @ datum_first).sum(0)
        else:
            add_rows(total, _copied(part, total.dtype))
    return total


def mirrored(total: Float[Tensor, "group d d"]) -> Float[Tensor, "group d d"]:
    """The total with its lower triangle in the place of the upper one too: exactly symmetric."""
    d = total.shape[-1]
    lower = torch.ones(TILE, TILE, dtype=torch.bool, device=total.device).tril_()
    for start in range(0, d, TILE):
        new = slice(start, min(start + TILE, d))
        size = new.stop - start
        # Dense first: a transpose is fast between dense matrices alone.
        total[:, :start, new] = total[:, new, :start].contiguous().mT.contiguous()
        corner = total[:, new, new].contiguous()
        total[:, new, new] = torch.where(lower[:size, :size], corner, corner.mT)
    return total


def add_rows(total: Float[Tensor, "group d d"], rows: Float[Tensor, "group rows d"]) -> None:
    """Add the products of rows that BLAS can read as they are."""
    group, d = len(rows), rows.shape[-1]
    if group > 1 and strips(d) == 1:
        total.baddbmm_(rows.mT, rows)
        return
    fast = rows.stride(-1) == 1 and is_faster(rows, d)
    if images := rows.shape[1] // IMAGE * IMAGE if fast else 0:
        for t, x in zip(total, rows, strict=True):
            add_by_channels(t.unsqueeze(0), as_images(x[:images]))
        rows = rows[:, images:]
    if rows.shape[1]:
        _add_strips(total, rows)


def _add_strips(total: Tensor, rows: Tensor) -> None:
    """By matrix products: strips of rows, as long as the triangle has them."""
    d = rows.shape[-1]
    width = max(1, -(-d // strips(d)))
    for t, x in zip(total, rows, strict=True):
        for start in range(0, d, width):
            strip, end = slice(start, start + width), min(start + width, d)
            t[strip, :end].addmm_(x[:, strip].mT, x[:, :end])


def strips(d: int) -> int:
    """The number of strips that a triangle is taken in; one is the whole square."""
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
