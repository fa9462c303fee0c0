"""Options that are out of their range, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from fxkfac.errors import OptionError


def require(holds: bool, message: str) -> None:
    """Raise `OptionError` unless it holds."""
    if not holds:
        raise OptionError(message)


def require_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise `OptionError` unless a state has these keys."""
    require(
        set(keys) <= state.keys(),
        f"a state of {sorted(state)[:8]}; expected one of this class, {list(keys)}.",
    )


def require_positive(name: str, value: Any) -> None:
    """Raise `OptionError` unless a number is positive."""
    holds = isinstance(value, int | float) and 0 < value < inf
    require(holds, f"{name}={value!r}; expected a positive number.")


def require_not_negative(name: str, value: Any) -> None:
    """Raise `OptionError` for a number below zero."""
    holds = isinstance(value, int | float) and value >= 0
    require(holds, f"{name}={value!r}; expected zero or a positive number.")


def require_fraction(name: str, value: Any) -> None:
    """Raise `OptionError` unless a number is a decay."""
    holds = isinstance(value, int | float) and 0 <= value < 1
    require(holds, f"{name}={value!r}; expected a number from 0 to less than 1.")


def require_at_least_one(name: str, value: Any) -> None:
    """Raise `OptionError` unless it is a number of steps."""
    counts = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(counts, f"{name}={value!r}; expected a whole number of steps, one at least.")
