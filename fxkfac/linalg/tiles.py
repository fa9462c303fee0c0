"""Rows x -> scale · Σ_rows x xᵀ by a kernel in C++, with both triangles of it.

With one thread it takes 0.6 to 0.8 of the time that BLAS takes for the square; a triangle by matrix
products with the other one copied takes 0.65 to 1.3. Only compiled code calls it: there a compiler
is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAMES = {torch.float32: "gram_float", torch.float64: "gram_double"}
# As the code has them: where the sum is, rows, their offsets, those of columns, and how to do it.
ARGUMENTS = [
    *(c_void_p, c_int64),
    *(c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    *(c_double, c_int64, c_void_p, c_int),
]
FEWEST = 96  # columns: for fewer the square takes no longer
KNOWN = 1024  # axes whose offsets are kept, of rows or columns that are the same at every batch
CHUNK = 2**18  # numbers of the rows that are copied at once, or
SUMS = 2  # times as many as the sum has, if that is more


@dataclass(frozen=True)
class Kernel:
    """The kernel for one dtype.

    Attributes:
        run: It, as C calls it.
        width: Of how many columns a panel is.
    """

    run: Callable[..., None]
    width: int

    def write(
        self,
        total: Float[Tensor, "group d d"],
        x: Float[Tensor, " group *rows_and_columns"],
        scale: float,
        columns: int = 1,
    ) -> None:
        """Write scale · Σ_rows x xᵀ of every group.

        Args:
            total: Where to, with rows that are contiguous.
            x: Of any strides; entries may share memory. There is at least one row.
            scale: What the sums are multiplied by.
            columns: How many of the last axes make up d; rows are in those between.
        """
        axes = tuple(zip(x.shape, x.stride(), strict=True))
        down, across = _offsets(axes[1:-columns]), _offsets(axes[-columns:])
        d = -(-len(across) // self.width) * self.width
        chunk = min(len(down), max(CHUNK, SUMS * d**2) // d)
        panels, threads = x.new_empty(chunk * d), torch.get_num_threads()
        places = (down.data_ptr(), len(down), across.data_ptr(), len(across))
        for sums, rows in zip(total.unbind(), x.unbind(), strict=True):
            to = (sums.data_ptr(), sums.stride(0))
            how = (scale, chunk, panels.data_ptr(), threads)
            self.run(*to, rows.data_ptr(), *places, *how)


def kernel_for(total: Float[Tensor, "group d d"], x: Tensor) -> Kernel | None:
    """The one that pays for such a sum of rows, all in the memory of a CPU, if there is one."""
    if x.dtype != total.dtype or x.dtype not in NAMES or total.shape[-1] < FEWEST:
        return None
    return _kernels().get(x.dtype) if x.numel() else None


@lru_cache(maxsize=KNOWN)
def _offsets(axes: tuple[tuple[int, int], ...]) -> Int[Tensor, " entries"]:
    """Where the entries of axes of such lengths and strides are, in order."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in axes:
        along = torch.arange(size, device="cpu") * step
        found = (found.unsqueeze(1) + along).flatten()
    return found


@cache
def _kernels() -> Mapping[torch.dtype, Kernel]:
    """One for each dtype; none where they cannot be compiled, as by a compiler without vectors."""
    from torch._inductor.codecache import CppCodeCache  # takes seconds

    code = files(__package__).joinpath("tiles.cpp").read_text()
    try:
        library: Any = CppCodeCache.load(code, extra_flags=("-ffp-contract=fast",))
    except (OSError, RuntimeError):
        return {}
    kernels = {}
    for dtype, name in NAMES.items():
        run = library[name]
        run.restype, run.argtypes = None, ARGUMENTS
        kernels[dtype] = Kernel(run, library[f"{name}_width"]())
    return kernels
