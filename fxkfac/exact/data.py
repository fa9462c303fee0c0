"""One data set from what the user hands in: (inputs, targets), or an iterable of such pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fxkfac.errors import DataError

Data = Any
"""(inputs, targets) with a tensor of targets, or an iterable of (inputs, targets).

N is the length of axis 0 of the first input: data along another axis would be counted by that.

Targets that are not a tensor (for a likelihood of the user's own) come as `[(inputs, targets)]`.
"""


def merge(data: Data) -> tuple[Any, Any]:
    """All batches, put together along axis 0 of every tensor that holds one row for each datum.

    Raises:
        DataError: There are no data, or batches that do not fit each other.
    """
    pairs = [(_plain(inputs), targets) for inputs, targets in _pairs(data)]
    if not pairs:
        raise DataError("there are no data; expected at least one (inputs, targets).")
    if len(pairs) == 1:
        return pairs[0]
    inputs, targets = zip(*pairs, strict=True)
    return _concatenate(inputs, [size_of(x) for x in inputs]), _concatenate(targets, None)


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


def _concatenate(batches: tuple[Any, ...], sizes: list[int] | None) -> Any:
    """Join trees leaf by leaf; with `sizes`, leaves that are no batch must be the same in all."""
    flat, specs = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise DataError("batches differ in structure; expected the same tensors in each.")
    joined = []
    for leaves in zip(*flat, strict=True):
        lengths = [len(t) if isinstance(t, Tensor) and t.ndim else None for t in leaves]
        if None not in lengths and sizes in (None, lengths):
            joined.append(torch.cat(leaves))
        elif all(_same(leaves[0], leaf) for leaf in leaves):
            joined.append(leaves[0])
        else:
            raise DataError(
                f"batches hold {[getattr(t, 'shape', t) for t in leaves][:3]}, which neither share "
                "the batch axis nor are equal. Put the batch on axis 0, or pass one batch."
            )
    return tree_unflatten(joined, specs[0])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)
