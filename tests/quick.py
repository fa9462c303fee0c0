"""Which of many cases `make test` runs; the others are slow tests, which CI runs as well."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], is_quick: Callable[[Any], bool]) -> list[Any]:
    """The cases, those marked as slow for which `is_quick` does not hold."""
    return [c if is_quick(c) else _slow(c) for c in cases]


def one_in(count: int) -> Callable[[Any], bool]:
    """Holds for one case in `count`, the same ones whatever else there is."""
    return lambda case: zlib.crc32(repr(case).encode()) % count == 0


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
