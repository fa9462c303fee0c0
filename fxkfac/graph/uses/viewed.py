"""Reading tensors that come again and again: where the result lies is remembered.

A chain of views is one view. Which one depends on the shape and the strides alone, so that it is
worked out once, and then costs one call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

KNOWN = 256  # at most: ways of reading times shapes of batches


class _View(NamedTuple):
    """What a view is of a tensor that begins at the beginning of its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Reader:
    """Calls functions of a tensor; those that are views of it, once for each shape and layout."""

    def __init__(self) -> None:
        self._view = lru_cache(maxsize=KNOWN)(_view)

    def __call__(self, read: Callable[..., Any], t: Tensor, *rest: Hashable) -> Any:
        """`read(t, *rest)`, a function of whose result nothing but values depends on values."""
        found = self.view(read, t, *rest)
        return read(t, *rest) if found is None else found

    def view(self, read: Callable[..., Any], t: Tensor, *rest: Hashable) -> Tensor | None:
        """The same where it is a view of a tensor that nothing follows or records, else `None`."""
        if type(t) is not Tensor or _followed(t):
            return None
        view = self._view(read, t.shape, t.stride(), t.dtype, rest)
        if view is None:
            return None
        return t.as_strided(view.size, view.stride, t.storage_offset() + view.offset)


def _followed(t: Tensor) -> bool:
    """Whether something watches what happens to a tensor: autograd, or a transform."""
    watched = t.requires_grad and torch.is_grad_enabled()
    return watched or torch._C._are_functorch_transforms_active()


def _view(
    read: Callable[..., Any],
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    rest: tuple[Hashable, ...],
) -> _View | None:
    """Where the result lies; `None` where it takes a copy or a sum."""
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    found = read(like, *rest)
    if not isinstance(found, Tensor) or found.dtype != dtype:
        return None
    same = found.untyped_storage()._cdata == like.untyped_storage()._cdata
    return _View(found.shape, found.stride(), int(found.storage_offset())) if same else None
