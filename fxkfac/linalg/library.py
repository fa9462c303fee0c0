"""The sums that are written in C++, compiled once on a machine for each dtype."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_void_p
from importlib.resources import files
from inspect import signature
from typing import Any, NamedTuple

import torch

SOURCES = ("rows", "vectors", "panels", "boxes", "moved")
OF_DIGITS = ("digits", "products", "sums")  # in single precision
TYPES = {torch.float32: ("float", c_float), torch.float64: ("double", c_double)}
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


def functions(dtype: torch.dtype) -> Functions | None:
    """Those of one dtype; `None` without a compiler, or where it knows no vectors."""
    (_, number), has_digits = TYPES[dtype], dtype == torch.float32
    try:
        library = _compiled(dtype, (*SOURCES, *OF_DIGITS) if has_digits else SOURCES)
    except (OSError, RuntimeError):
        return None
    rows = _run(library.gram, number, c_void_p, c_bool, c_void_p, c_int)
    moved = _run(library.moved, number, c_void_p, c_void_p, c_int)
    return Functions(
        Function(rows, _room(library.gram_room, *SIZES, c_int)),
        Function(moved, _room(library.moved_room, *SIZES, c_void_p, c_int)),
        _digits(library) if has_digits else None,
    )


def _compiled(dtype: torch.dtype, sources: tuple[str, ...]) -> Any:
    from torch._inductor.codecache import CppCodeCache  # takes seconds

    folder = files(__package__).joinpath("native")
    parts = [folder.joinpath(f"{source}.cpp").read_text() for source in sources]
    processor = getattr(torch.cpu, "get_capabilities", torch.backends.cpu.get_cpu_capability)()
    # Those that share a disk have code of their own.
    code = "\n".join([f"using Number = {TYPES[dtype][0]};", *parts, f"// {processor}"])
    flags: dict[str, Any] = {"extra_flags": ("-ffp-contract=fast",)}
    if "needs_vec_isa" in signature(CppCodeCache.load_async).parameters:
        flags["needs_vec_isa"] = False  # which vectors there are takes a second to find out
    return CppCodeCache.load(code, **flags)


def _digits(library: Any) -> Function | None:
    """`None` where the processor has no such tiles, or the system lets no one have them."""
    room = _room(library.digits_room, *SIZES, c_int)
    if not room(1, 1, 1):
        return None
    return Function(_run(library.digits_gram, c_int64, c_void_p, c_void_p, c_int), room)


def _run(found: Any, gives: Any, *more: Any) -> Callable[..., Any]:
    found.restype, found.argtypes = gives, (*SUM, *ROWS, *more)
    run: Callable[..., Any] = found
    return run


def _room(found: Any, *takes: Any) -> Callable[..., int]:
    found.restype, found.argtypes = c_int64, takes
    room: Callable[..., int] = found
    return room
