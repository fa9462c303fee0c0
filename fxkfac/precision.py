"""Half precision is for the model: sums, exponentials and decompositions take float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

ACCURATE = (torch.float32, torch.float64)
WITHOUT_FLOAT64 = ("mps",)  # devices


def accurate(t: Tensor) -> Tensor:
    """The same in float32 or better: sums in half precision are ruined."""
    return t if t.dtype in ACCURATE else t.to(accurate_dtype(t))


def widest(t: Tensor) -> Tensor:
    """The same in float64, for squares and products that float32 has no room for.

    In float32 on a device that has no float64.
    """
    return accurate(t) if t.device.type in WITHOUT_FLOAT64 else t.double()


def accurate_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which what is made of a tensor is summed: float32 or better."""
    return t.dtype if t.dtype in ACCURATE else torch.promote_types(t.dtype, torch.float32)
