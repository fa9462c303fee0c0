"""What is not a tensor -> a key that is equal where a graph of it is the same graph.

A graph holds what Python read while it was traced. So what stands for a value here is all that
Python can read: its type, and its value or, where it has none that can be compared, its identity.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import EllipsisType, FunctionType, ModuleType, NoneType
from typing import Any

import torch

OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
BY_VALUE = frozenset([NoneType, EllipsisType, bool, int, str, bytes, range, *OF_TORCH])
BY_IDENTITY = (type, FunctionType, ModuleType, torch.Tensor)
SEQUENCES = (list, tuple, set, frozenset)


@dataclass(frozen=True, eq=False)
class Same:
    """An object that is equal to itself alone. It is held, so that no other gets its `id`."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Same:
        """The same object, or the copy that what holds it has got: a key copies nothing itself."""
        return Same(memo.get(id(self.value), self.value))


def constant_key(value: Any) -> Hashable:
    """Type and value of a constant; nested ones, and arrays, by what is in them.

    Other objects count by identity and by the plain values among their attributes: one that is
    changed in place is noticed as far as those say it.
    """
    plain = _plain(value, ())
    if not isinstance(plain, Same) or isinstance(value, BY_IDENTITY):
        return plain
    held = tuple((name, _plain(part, ())) for name, part in _attributes(value).items())
    return (plain, held) if held else plain


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds in its dict and in its slots."""
    own = getattr(value, "__dict__", None)
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return slots | (own if isinstance(own, dict) else {})


def _slots(kind: type) -> tuple[str, ...]:
    named = kind.__dict__.get("__slots__", ())
    return tuple(n for n in ([named] if isinstance(named, str) else named) if n[:2] != "__")


def _plain(value: Any, above: tuple[int, ...]) -> Hashable:
    kind = type(value)
    if kind in BY_VALUE:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)  # -0.0 is not 0.0, and nan is nan
    if id(value) in above:
        return Same(value)  # it holds itself
    above = (*above, id(value))
    if kind is slice:
        return kind, tuple(_plain(v, above) for v in (value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        pairs = value.items()
        return kind, tuple((_plain(k, above), _plain(v, above)) for k, v in pairs)
    if isinstance(value, SEQUENCES):
        parts = tuple(_plain(v, above) for v in value)
        return kind, parts if isinstance(value, list | tuple) else frozenset(parts)
    return _array(value, above) or Same(value)


def _array(value: Any, above: tuple[int, ...]) -> Hashable:
    """That of an array or number of numpy's; nothing else is one where numpy is not imported."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic):
        return None
    if value.dtype.hasobject:
        return type(value), value.shape, tuple(_plain(v, above) for v in value.flat)
    return type(value), value.shape, str(value.dtype), value.tobytes()
