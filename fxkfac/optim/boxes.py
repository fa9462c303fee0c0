"""A block's table of entries -> the same as strides: reading a gradient is a view, not a look-up.

Most parameters lie in their block as a box of its rows and columns, in steps that do not change: a
weight transposed, its bias one more row, the channels of a kernel side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Box:
    """Where one parameter lies in the block's order (group, in, out).

    Attributes:
        rows: Of the in axis.
        columns: Of the out axis.
        size: Its lengths, (group, in, out).
        strides: Of the parameter's entries along these.
    """

    rows: slice
    columns: slice
    size: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, parameter: Tensor) -> Float[Tensor, "group rows columns"]:
        """A view of a contiguous tensor of the parameter's shape."""
        return parameter.as_strided(self.size, self.strides, parameter.storage_offset())

    def part(self, matrix: Float[Tensor, "group d_in d_out"]) -> Tensor:
        """A view of the block's matrix."""
        return matrix[:, self.rows, self.columns]


def boxes_of(
    entries: Int[Tensor, "group d_in d_out"], sizes: Sequence[int]
) -> tuple[Box, ...] | None:
    """The box of every parameter; `None` where one of them is none, or lacks an entry.

    Args:
        entries: Numbers along the concatenated parameters.
        sizes: The number of entries of each.
    """
    found, start = [], 0
    for size in sizes:
        box = _box(entries, start, size)
        if box is None:
            return None
        found.append(box)
        start += size
    return tuple(found)


def _box(entries: Tensor, start: int, size: int) -> Box | None:
    inside = (entries >= start) & (entries < start + size)
    axes = [_range(inside.any(2).any(0)), _range(inside.any(1).any(0))]
    if axes[0] is None or axes[1] is None or int(inside.sum()) != size:
        return None
    numbers = entries[:, axes[0], axes[1]] - start
    if numbers.numel() != size or int(numbers[0, 0, 0]) != 0:
        return None
    along = [numbers[:, 0, 0], numbers[0, :, 0], numbers[0, 0, :]]
    strides = tuple(int(n[1]) if len(n) > 1 else 0 for n in along)
    steps = [s * torch.arange(len(n), device="cpu") for s, n in zip(strides, along, strict=True)]
    straight = steps[0].view(-1, 1, 1) + steps[1].view(-1, 1) + steps[2]
    if not numbers.equal(straight) or len(numbers.unique()) != size:
        return None
    return Box(axes[0], axes[1], tuple(numbers.shape), strides)


def _range(inside: Tensor) -> slice | None:
    """From the first to the last that is inside."""
    at = inside.nonzero().flatten()
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else None
