"""einops' `rearrange` for tensors that come again and again: where its result lies is remembered.

A rearrangement without a copy is one view. Which one depends on the pattern, the shape and the
strides alone, so that it is worked out once, and then costs one call.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import reduce
from torch import Tensor

KNOWN = 4096  # at most: patterns times shapes of batches


def rearranged(t: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.reduce(t, pattern, "sum", **sizes)`, which rearranges where no axis is left out."""
    if type(t) is Tensor and not _followed(t):
        view = _view(pattern, t.shape, t.stride(), tuple(sizes.items()))
        if view is not None:
            return t.as_strided(*view, t.storage_offset())
    found: Tensor = reduce(t, pattern, "sum", **sizes)
    return found


def _followed(t: Tensor) -> bool:
    """Whether something watches what happens to a tensor: autograd, or a transform."""
    watched = t.requires_grad and torch.is_grad_enabled()
    return watched or torch._C._are_functorch_transforms_active()


@lru_cache(maxsize=KNOWN)
def _view(
    pattern: str, shape: torch.Size, strides: tuple[int, ...], sizes: tuple[tuple[str, int], ...]
) -> tuple[torch.Size, tuple[int, ...]] | None:
    """Size and strides of the result; `None` where it takes a copy or a sum."""
    like = torch.empty_strided(shape, strides, device="meta")
    found = reduce(like, pattern, "sum", **dict(sizes))
    same = found.untyped_storage()._cdata == like.untyped_storage()._cdata
    return (found.shape, found.stride()) if same else None
