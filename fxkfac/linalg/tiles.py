"""Rows x -> scale · Σ_rows x xᵀ by kernels in C++, both triangles of it.

Of the time that BLAS takes for the square, one by vectors takes 0.55 to 0.7 of many rows; one by
tiles of bytes, three to a number, which is as exact as single precision, takes 0.35 to 0.5. A
triangle by matrix products with the other one copied takes 0.65 to 1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from inspect import signature
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SOURCES = ("rows", "vectors", "panels", "digits", "products", "sums")
NAMES = {torch.float32: "gram_float", torch.float64: "gram_double"}
# As the code has them: where the sum is, and how it is put there; rows, and their offsets.
SUM = (c_void_p, c_int64, c_double, c_bool)
ROWS = (c_void_p, c_void_p, c_int64, c_void_p, c_int64)
KNOWN = 1024  # layouts of which it is known where rows and columns are, for the next batch,
SHORT = 2**14  # if no more rows: to find out takes a hundredth of the time of the sum of more

FEWEST, SHORTEST, LEAST = 48, 64, 2**15  # columns, rows and numbers that PyTorch takes longer for,
COPIED = 16  # columns, however many rows, where it would have to copy these first
NARROWEST, NUMBERS = 64, 2**16  # columns and numbers that are worth their digits


class Digits(NamedTuple):
    """The kernel that has three digits in the place of a number.

    Attributes:
        run: It, as C calls it; returns how many of the first rows were summed. It ends before a
            part in which some column's largest number is too large, or too small and not zero.
        room: How many bytes it works in, for rows, columns and threads.
    """

    run: Callable[..., int]
    room: Callable[[int, int, int], int]


class Places(NamedTuple):
    """Where the entries of an axis are, and where C finds that; how many there are."""

    offsets: Int[Tensor, " entries"]
    address: int
    number: int

    @staticmethod
    def of(offsets: Int[Tensor, " entries"]) -> Places:
        """Such places."""
        return Places(offsets, offsets.data_ptr(), len(offsets))


class Matrix(NamedTuple):
    """A matrix in memory: where it starts, and what is added to that for its rows and columns."""

    start: int
    down: Places
    across: Places

    def after(self, number: int) -> Matrix:
        """All but so many rows, the first ones."""
        return self._replace(down=Places.of(self.down.offsets[number:])) if number else self

    def given(self) -> tuple[int, int, int, int, int]:
        """As C takes it."""
        _, down, rows = self.down
        _, across, d = self.across
        return self.start, down, rows, across, d


class Added(NamedTuple):
    """What there is to know of rows that were added.

    Attributes:
        sums: Σ_rows x, (group, d), where it was asked for.
        are_finite: Whether it is known that there was neither NaN nor Inf, and is none in the sum.
    """

    sums: Tensor | None
    are_finite: bool


@dataclass(frozen=True)
class Kernel:
    """What there is for one dtype.

    Attributes:
        run: The kernel that takes any rows, as C calls it; returns the trace of the sum.
        room: How many numbers it works in, for rows, columns and threads.
        dtype: Of these.
        digits: The one that takes many in less time, if there is one.
    """

    run: Callable[..., float]
    room: Callable[[int, int, int], int]
    dtype: torch.dtype
    digits: Digits | None = None

    def takes_digits(self, rows: int, d: int) -> bool:
        """Whether so many rows are summed by that one."""
        return self.digits is not None and d >= NARROWEST and rows * d >= NUMBERS

    def pays(self, rows: int, d: int, copied: bool) -> bool:
        """Whether a product by PyTorch takes longer, which has to copy the rows first or not."""
        if self.takes_digits(rows, d) or (copied and d >= COPIED):
            return rows > 0
        return d >= FEWEST and rows >= SHORTEST and rows * d >= LEAST

    def add(
        self,
        total: Float[Tensor, "group d d"],
        x: Float[Tensor, " group *rows_and_columns"],
        columns: int = 1,
        *,
        scale: float,
        adds: bool,
        summed: bool = False,
    ) -> Added:
        """Add scale · Σ_rows x xᵀ of every group, or write it.

        Args:
            total: Where to, with rows that are contiguous; symmetric if it is added to.
            x: Of any strides; entries may share memory. There is at least one row.
            columns: How many of the last axes make up d; rows are in those between.
            scale: What the sums are multiplied by.
            adds: Whether to add.
            summed: Whether to return Σ_rows x, too.
        """
        down, across = _rows_and_columns(x.shape, x.stride(), columns)
        sums = total.new_empty(x.shape[0], across.number) if summed else None
        are_finite = True
        for k in range(x.shape[0]):
            to = _address(total, k), total.stride(1), scale
            rows = Matrix(_address(x, k), down, across)
            more = None if sums is None else _address(sums, k)
            done = self._by_digits(to, adds, rows, more)
            if done < down.number:
                trace = self._by_vectors(to, adds or done > 0, rows.after(done), more, done > 0)
                are_finite &= isfinite(trace)
        return Added(sums, are_finite)

    def _by_digits(
        self, to: tuple[int, int, float], adds: bool, rows: Matrix, sums: int | None
    ) -> int:
        """How many of the first rows were summed by these."""
        number, d = rows.down.number, rows.across.number
        if self.digits is None or not self.takes_digits(number, d):
            return 0
        threads = torch.get_num_threads()
        room = torch.empty(self.digits.room(number, d, threads), dtype=torch.uint8, device="cpu")
        return self.digits.run(*to, adds, *rows.given(), sums, room.data_ptr(), threads)

    def _by_vectors(
        self,
        to: tuple[int, int, float],
        adds: bool,
        rows: Matrix,
        sums: int | None,
        adds_sums: bool,
    ) -> float:
        """The trace of the sum."""
        threads = torch.get_num_threads()
        numbers = self.room(rows.down.number, rows.across.number, threads)
        room = torch.empty(numbers, dtype=self.dtype, device="cpu")
        return self.run(*to, adds, *rows.given(), sums, adds_sums, room.data_ptr(), threads)


def _address(t: Tensor, number: int) -> int:
    """Where a part of the first axis begins."""
    return t.data_ptr() + number * t.stride(0) * t.element_size()


def kernel_for(
    total: Float[Tensor, "group d d"], x: Tensor, rows: int, copied: bool = False
) -> Kernel | None:
    """The one that pays for such a sum, if there is one.

    Args:
        total: Where to.
        x: What the rows are made of.
        rows: How many there are in each group.
        copied: Whether a product by PyTorch would have to copy them first.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None  # what is recorded is PyTorch's operations
    if (dtype := x.dtype) != total.dtype or dtype not in NAMES:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # a transform wraps whatever is made now
    if total.stride(2) != 1 or not (_is_in_memory(total) and _is_in_memory(x)):
        return None
    kernel = _kernels().get(dtype)
    return kernel if kernel and kernel.pays(rows, total.shape[-1], copied) else None


def _is_in_memory(t: Tensor) -> bool:
    """Whether a CPU finds numbers, and nothing else has to hear of what is done with them."""
    if not t.is_cpu or type(t) is not Tensor or t._is_zerotensor():
        return False
    is_heard = t.requires_grad and torch.is_grad_enabled()
    return not is_heard and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _rows_and_columns(
    shape: tuple[int, ...], strides: tuple[int, ...], columns: int
) -> tuple[Places, Places]:
    """Where rows are in a group, and columns in a row; columns have so many of the last axes."""
    short = prod(shape[1:-columns]) <= SHORT
    return (_known if short else _found)(shape, strides, columns)


def _found(shape: tuple[int, ...], strides: tuple[int, ...], columns: int) -> tuple[Places, Places]:
    axes = tuple(zip(shape, strides, strict=True))
    return _places(axes[1:-columns]), _places(axes[-columns:])


_known = lru_cache(maxsize=KNOWN)(_found)


def _places(axes: tuple[tuple[int, int], ...]) -> Places:
    """Where the entries of axes of such lengths and strides are, in order."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in axes:
        along = torch.arange(size, device="cpu") * step
        found = (found.unsqueeze(1) + along).flatten()
    return Places.of(found)


@cache
def _kernels() -> Mapping[torch.dtype, Kernel]:
    """One for each dtype, compiled once on a machine.

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
    return {dtype: _kernel(library, dtype) for dtype in NAMES}


def _kernel(library: Any, dtype: torch.dtype) -> Kernel:
    name = NAMES[dtype]
    run, room = library[name], library[f"{name}_room"]
    run.restype = c_float if dtype == torch.float32 else c_double
    run.argtypes = [*SUM, *ROWS, c_void_p, c_bool, c_void_p, c_int]
    room.restype, room.argtypes = c_int64, [c_int64, c_int64, c_int]
    return Kernel(run, room, dtype, _digits(library) if dtype == torch.float32 else None)


def _digits(library: Any) -> Digits | None:
    """`None` where the processor has no such tiles, or the system lets no one have them."""
    room = library.gram_digits_room
    room.restype, room.argtypes = c_int64, [c_int64, c_int64, c_int]
    if not room(1, 1, 1):
        return None
    run = library.gram_digits
    run.restype, run.argtypes = c_int64, [*SUM, *ROWS, c_void_p, c_void_p, c_int]
    return Digits(run, room)
