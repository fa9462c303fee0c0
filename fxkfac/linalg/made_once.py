"""Tensors that are made once and used again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

KNOWN = 256  # where nothing else is said


def made_once(make: Callable[P, R], most: int = KNOWN) -> Callable[P, R]:
    """`lru_cache` for what holds tensors: so many at most.

    They are made with values also while a graph is recorded without any: for the graph they are
    constants, and whoever finds them later computes with them.
    """

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        with _disable_current_modes():
            return make(*args, **kwargs)

    return cast("Callable[P, R]", lru_cache(maxsize=most)(made))
