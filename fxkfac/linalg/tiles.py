"""Rows x -> scale · Σ_rows x xᵀ by kernels in C++, both triangles of it.

Of the time that BLAS takes for the square, one by vectors takes 0.55 to 0.7 of many rows; one by
tiles of bytes, three to a number, which is as exact as single precision, takes 0.35 to 0.5. A
triangle by matrix products with the other one copied takes 0.65 to 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxkfac.linalg.library import TYPES, Functions, functions
from fxkfac.linalg.places import Placed, addresses, layout_of, room

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST, SHORTEST, LEAST = 48, 64, 2**15  # columns, rows and numbers that PyTorch takes longer for,
COPIED = 16  # columns, however many rows, where it would have to copy these first
NARROWEST, NUMBERS = 64, 2**16  # columns and numbers that are worth their digits


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
    """What there is for one dtype: of rows, sums and the room."""

    dtype: torch.dtype
    functions: Functions

    def takes_digits(self, rows: int, d: int) -> bool:
        """Whether so many rows are summed by that one."""
        return self.functions.digits is not None and d >= NARROWEST and rows * d >= NUMBERS

    def pays(self, rows: int, d: int, copied: bool) -> bool:
        """Whether a product by PyTorch takes longer, which has to copy the rows first or not."""
        if self.takes_digits(rows, d) or (copied and d >= COPIED):
            return rows > 0
        return d >= FEWEST and rows >= SHORTEST and rows * d >= LEAST

    def add(
        self,
        total: Float[Tensor, "group d d"],
        scale: float,
        adds: bool,
        *,
        x: Float[Tensor, " group *rows_and_columns"],
        columns: int = 1,
        summed: bool = False,
    ) -> Added:
        """Add scale · Σ_rows x xᵀ of every group, or write it.

        Args:
            total: Where to, with rows that are contiguous; symmetric if it is added to.
            scale: What the sums are multiplied by.
            adds: Whether to add.
            x: Of any strides; entries may share memory. There is at least one row.
            columns: How many of the last axes make up d; rows are in those between.
            summed: Whether to return Σ_rows x, too.
        """
        layout, starts = layout_of(x, columns), addresses(x)
        sums = total.new_empty(len(starts), total.shape[-1]) if summed else None
        add_to = [None] * len(starts) if sums is None else addresses(sums)
        are_finite = True
        for place, start, more in zip(addresses(total), starts, add_to, strict=True):
            to = place, total.stride(1), scale
            done = self._by_digits(to, adds, layout.at(start), more)
            if done < layout.down.number:
                rest = layout.after(done)
                trace = self._by_vectors(to, adds or done > 0, rest.at(start), more, done > 0)
                are_finite &= isfinite(trace)
        return Added(sums, are_finite)

    def _by_digits(
        self, to: tuple[int, int, float], adds: bool, rows: Placed, sums: int | None
    ) -> int:
        """How many of the first rows were summed by these."""
        _, _, number, _, d = rows
        digits, threads = self.functions.digits, torch.get_num_threads()
        if digits is None or not self.takes_digits(number, d):
            return 0
        within = room(digits.room(number, d, threads), torch.uint8)
        return digits.run(*to, adds, *rows, sums, within.data_ptr(), threads)

    def _by_vectors(
        self,
        to: tuple[int, int, float],
        adds: bool,
        rows: Placed,
        sums: int | None,
        adds_sums: bool,
    ) -> float:
        """The trace of the sum."""
        _, _, number, _, d = rows
        vectors, threads = self.functions.rows, torch.get_num_threads()
        within = room(vectors.room(number, d, threads), self.dtype)
        return vectors.run(*to, adds, *rows, sums, adds_sums, within.data_ptr(), threads)


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
    if (dtype := x.dtype) != total.dtype or dtype not in TYPES:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # a transform wraps whatever is made now
    if total.stride(2) != 1 or not (_is_in_memory(total) and _is_in_memory(x)):
        return None
    kernel = kernel_of(dtype)
    return kernel if kernel and kernel.pays(rows, total.shape[-1], copied) else None


def _is_in_memory(t: Tensor) -> bool:
    """Whether a CPU finds numbers, and nothing else has to hear of what is done with them."""
    if not t.is_cpu or type(t) is not Tensor or t._is_zerotensor():
        return False
    is_heard = t.requires_grad and torch.is_grad_enabled()
    return not is_heard and not torch._C._functorch.is_functorch_wrapped_tensor(t)


@cache
def kernel_of(dtype: torch.dtype) -> Kernel | None:
    """The one for single or double precision, if it can be."""
    found = functions(dtype)
    return None if found is None else Kernel(dtype, found)
