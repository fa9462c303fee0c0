"""Tensors that travel together: one flat buffer for every dtype, and each one's part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def flat(
    tensors: Sequence[tuple[Shape, torch.dtype]], device: torch.device, zero: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for tensors of these shapes and dtypes.

    Returns:
        The buffers, in an order that all ranks have, and for each tensor its view of one.
    """
    totals: dict[torch.dtype, int] = {}
    parts = []
    for shape, dtype in tensors:
        start = totals.get(dtype, 0)
        totals[dtype] = start + torch.Size(shape).numel()
        parts.append(slice(start, totals[dtype]))
    make = torch.zeros if zero else torch.empty
    buffers = {dtype: make(totals[dtype], dtype=dtype, device=device) for dtype in totals}
    views = [buffers[d][part].view(s) for (s, d), part in zip(tensors, parts, strict=True)]
    return [buffers[dtype] for dtype in sorted(buffers, key=str)], views
