"""Batches from what the user hands in: (inputs, targets), or an iterable of such pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxkfac.errors import DataError

Data = Any
"""(inputs, targets) with a tensor of targets, or an iterable of (inputs, targets).

N is the length of axis 0 of a batch's first input: data along another axis, or an input first that
all data share, would be counted by that.

Targets that are not a tensor (for a likelihood of the user's own) come as `[(inputs, targets)]`.
"""


def batches(data: Data) -> list[tuple[Any, Any]]:
    """All (inputs, targets).

    Raises:
        DataError: There are no data, or what is no such pair.
    """
    found = [(_plain(inputs), targets) for inputs, targets in _pairs(data)]
    if not found:
        raise DataError("there are no data; expected at least one (inputs, targets).")
    return found


def size_of(inputs: Any) -> int:
    """N: the leading axis of the first tensor of the inputs."""
    for leaf in tree_leaves(_plain(inputs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if len(leaf) == 0:
                raise DataError("the inputs are empty; expected at least one datum.")
            return len(leaf)
    raise DataError(
        f"the inputs ({type(inputs).__name__}) hold no tensor with an axis; expected a tensor, a "
        "tuple or list of them, or a dict of keyword arguments, with the batch on axis 0."
    )


def _pairs(data: Data) -> list[tuple[Any, Any]]:
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        return [(data[0], data[1])]
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping):
        raise _unreadable(data)
    batches = list(data)
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise _unreadable(batch)
    return [(inputs, targets) for inputs, targets in batches]


def _unreadable(found: Any) -> DataError:
    return DataError(
        f"data hold a {type(found).__name__}; expected (inputs, targets), or an iterable of such "
        "pairs."
    )


def _plain(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs
