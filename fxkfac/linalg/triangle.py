"""Symmetric matrices without their redundant half, as rectangles: for what is sent or stored.

The lower triangle of M has d (d + 1) / 2 numbers. With M cut into its first k = ⌈d / 2⌉ columns and
the rest, these columns are a rectangle that has room above its diagonal for the triangle of the
rest, the upper one (one more row, where d is even): "rectangular full packed" (Gustavson et al.
2010). So packing copies blocks, and needs no table of places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def packed_shape(d: int) -> tuple[int, int]:
    """The rectangle that d (d + 1) / 2 numbers take."""
    return d + (d % 2 == 0), (d + 1) // 2


def pack_symmetric(
    M: Float[Tensor, "*batch d d"], into: Float[Tensor, "*batch rows columns"]
) -> None:
    """Write one half of a symmetric M into a rectangle of `packed_shape`."""
    shift, k = _cut(M.shape[-1])
    into[..., shift:, :] = M[..., :, :k]
    corner = _corner(into, M.shape[-1])
    corner.copy_(torch.where(_upper(corner), M[..., k:, k:], corner))


def unpack_symmetric(packed: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch d d"]:
    """The matrix of which `pack_symmetric` has written one half; symmetric, bit for bit."""
    rows, columns = packed.shape[-2:]
    d = rows - (rows == 2 * columns + 1)
    shift, k = _cut(d)
    M = packed.new_empty(*packed.shape[:-2], d, d)
    M[..., :, :k] = packed[..., shift:, :]
    M[..., :k, k:] = M[..., k:, :k].mT
    first, corner = M[..., :k, :k], _corner(packed, d)
    first.copy_(torch.where(_upper(first), first.mT, first))
    M[..., k:, k:] = torch.where(_upper(corner), corner, corner.mT)
    return M


def _cut(d: int) -> tuple[int, int]:
    """By how many rows the first columns are moved down, and how many they are."""
    return int(d % 2 == 0), (d + 1) // 2


def _corner(packed: Tensor, d: int) -> Tensor:
    """Where the upper triangle of the last columns is: on and above the diagonal."""
    shift, k = _cut(d)
    return packed[..., : d - k, 1 - shift :]


def _upper(square: Tensor) -> Tensor:
    d = square.shape[-1]
    return torch.ones(d, d, dtype=torch.bool, device=square.device).triu_()
