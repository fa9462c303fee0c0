"""The sums that are written in C++, compiled once on a machine."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib.resources import files
from inspect import signature
from typing import Any, NamedTuple

import torch

SOURCES = ("rows", "vectors", "panels", "boxes", "moved", "digits", "products", "sums")
NAMES = {torch.float32: "float", torch.float64: "double"}
NUMBERS = {torch.float32: c_float, torch.float64: c_double}
# As the code has them: where the sum is, and how it is put there; rows, and their offsets.
SUM = (c_void_p, c_int64, c_double, c_bool)
ROWS = (c_void_p, c_void_p, c_int64, c_void_p, c_int64)
SIZES = (c_int64, c_int64)  # rows and columns


class Function(NamedTuple):
    """A sum as C calls it, and how many numbers, or bytes for digits, it works in."""

    run: Callable[..., Any]
    room: Callable[..., int]


class Functions(NamedTuple):
    """What there is for one dtype.

    Attributes:
        rows: Sums any rows; returns the trace of the sum.
        moved: Sums windows of images; returns the trace of the sum.
        digits: Sums rows that have three digits in the place of a number; returns how many of the
            first ones. It ends before a part in which some column's largest number is too large, or
            too small and not zero.
    """

    rows: Function
    moved: Function
    digits: Function | None = None


@cache
def functions() -> dict[torch.dtype, Functions]:
    """Those of each dtype.

    None where they cannot be: without a compiler, or by one that knows no vectors.
    """
    from torch._inductor.codecache import CppCodeCache  # takes seconds

    folder = files(__package__).joinpath("native")
    code = "".join(folder.joinpath(f"{name}.cpp").read_text() for name in SOURCES)
    processor = getattr(torch.cpu, "get_capabilities", torch.backends.cpu.get_cpu_capability)()
    code += f"// {processor}"  # so that those that share a disk have code of their own
    flags: dict[str, Any] = {"extra_flags": ("-ffp-contract=fast",)}
    if "needs_vec_isa" in signature(CppCodeCache.load_async).parameters:
        flags["needs_vec_isa"] = False  # which vectors there are takes a second to find out
    try:
        library: Any = CppCodeCache.load(code, **flags)
    except (OSError, RuntimeError):
        return {}
    return {dtype: _functions(library, dtype) for dtype in NAMES}


def _functions(library: Any, dtype: torch.dtype) -> Functions:
    number, name = NUMBERS[dtype], NAMES[dtype]
    rows = Function(
        _run(library, f"gram_{name}", number, c_void_p, c_bool, c_void_p, c_int),
        _room(library, f"gram_{name}_room", *SIZES, c_int),
    )
    moved = Function(
        _run(library, f"moved_{name}", number, c_void_p, c_void_p, c_int),
        _room(library, f"moved_{name}_room", *SIZES, c_void_p, c_int),
    )
    return Functions(rows, moved, _digits(library) if dtype == torch.float32 else None)


def _digits(library: Any) -> Function | None:
    """`None` where the processor has no such tiles, or the system lets no one have them."""
    room = _room(library, "gram_digits_room", *SIZES, c_int)
    if not room(1, 1, 1):
        return None
    return Function(_run(library, "gram_digits", c_int64, c_void_p, c_void_p, c_int), room)


def _run(library: Any, name: str, gives: Any, *more: Any) -> Callable[..., Any]:
    found: Any = library[name]
    found.restype, found.argtypes = gives, (*SUM, *ROWS, *more)
    return found


def _room(library: Any, name: str, *takes: Any) -> Callable[..., int]:
    found: Any = library[name]
    found.restype, found.argtypes = c_int64, takes
    return found
