"""Options that are out of their range, by name.

A number or flag may be Python's or NumPy's, and comes back as Python's: so files and states hold
that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from torch import Generator, Tensor

from fxkfac.errors import OptionError


def require(holds: bool, message: str) -> None:
    """Raise `OptionError` unless it holds."""
    if not holds:
        raise OptionError(message)


def require_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise `OptionError` unless it is a state that has these keys."""
    found = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
    require(
        isinstance(state, Mapping) and set(keys) <= state.keys(),
        f"a state of {found}; expected one of this class, {list(keys)}.",
    )


def require_generator(generator: Any) -> None:
    """Raise `OptionError` unless it is one."""
    require(
        isinstance(generator, Generator),
        f"generator={generator!r}; expected a torch.Generator, such as "
        "torch.Generator().manual_seed(0).",
    )


def require_flag(name: str, value: Any) -> bool:
    """True or False. Raises `OptionError` for anything else."""
    found = value.item() if getattr(value, "shape", None) == () else value  # as NumPy's have it
    require(isinstance(found, bool), f"{name}={value!r}; expected True or False.")
    return bool(found)


def number_in(value: Any) -> Any:
    """The number that a tensor of no axes holds; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def require_number(name: str, value: Any) -> float:
    """A finite number. Raises `OptionError` for anything else."""
    require(isinstance(value, Real) and isfinite(value), f"{name}={value!r}; expected a number.")
    return float(value)


def require_positive(name: str, value: Any) -> float:
    """A positive number. Raises `OptionError` for anything else."""
    holds = isinstance(value, Real) and 0 < float(value) < inf
    require(holds, f"{name}={value!r}; expected a positive number.")
    return float(value)


def require_not_negative(name: str, value: Any) -> float:
    """A number that is not below zero. Raises `OptionError` for anything else."""
    holds = isinstance(value, Real) and 0 <= float(value) < inf
    require(holds, f"{name}={value!r}; expected zero or a positive number.")
    return float(value)


def require_fraction(name: str, value: Any) -> float:
    """A number that is a decay. Raises `OptionError` for anything else."""
    holds = isinstance(value, Real) and 0 <= float(value) < 1
    require(holds, f"{name}={value!r}; expected a number in [0, 1), such as 0.95.")
    return float(value)


def require_count(name: str, value: Any, of: str = "whole number", least: int = 1) -> int:
    """A whole number that is not below `least`. Raises `OptionError` for anything else."""
    counts = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    require(counts, f"{name}={value!r}; expected a {of}, at least {least}.")
    return int(value)
