"""Tensors -> where their entries are in memory, as C finds them; and memory that it works in."""

from __future__ import annotations

import threading
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KNOWN = 1024  # layouts of which it is known where rows and columns are, for the next batch,
SHORT = 2**14  # if no more rows: to find out takes a hundredth of the time of the sum of more
KEPT = 2**23  # bytes to work in that a thread keeps for the next sum, as BLAS does

_kept = threading.local()


class Places(NamedTuple):
    """Where the entries of an axis are, and where C finds that; how many there are."""

    offsets: Int[Tensor, " entries"]
    address: int
    number: int

    @staticmethod
    def of(offsets: Int[Tensor, " entries"]) -> Places:
        """Such places."""
        return Places(offsets, offsets.data_ptr(), len(offsets))


# A matrix in memory as C takes it: where it starts, offsets of rows, how many, those of columns.
Placed = tuple[int, int, int, int, int]


class Layout(NamedTuple):
    """How a matrix lies in memory: what is added to its start for rows, and for columns."""

    down: Places
    across: Places

    def after(self, number: int) -> Layout:
        """All but so many rows, the first ones."""
        return self._replace(down=Places.of(self.down.offsets[number:])) if number else self

    def at(self, start: int) -> Placed:
        """A matrix that lies so and starts there."""
        (_, down, rows), (_, across, d) = self
        return start, down, rows, across, d


def layout_of(x: Float[Tensor, " group *rows_and_columns"], columns: int = 1) -> Layout:
    """That of every group; columns are in so many of the last axes, and rows in those between."""
    short = prod(x.shape[1:-columns]) <= SHORT
    return (_known if short else _found)(x.shape, x.stride(), columns)


def addresses(t: Tensor) -> list[int]:
    """Where each part of the first axis begins."""
    start, step = t.data_ptr(), t.stride(0) * t.element_size()
    return [start + k * step for k in range(t.shape[0])]


def _found(shape: tuple[int, ...], strides: tuple[int, ...], columns: int) -> Layout:
    axes = tuple(zip(shape, strides, strict=True))
    return Layout(places_of(axes[1:-columns]), places_of(axes[-columns:]))


_known = lru_cache(maxsize=KNOWN)(_found)


def places_of(axes: tuple[tuple[int, int], ...]) -> Places:
    """Where the entries of axes of such lengths and strides are, in order."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in axes:
        along = torch.arange(size, device="cpu") * step
        found = (found.unsqueeze(1) + along).flatten()
    return Places.of(found)


def room(numbers: int, dtype: torch.dtype) -> Tensor:
    """Memory to work in, that may be someone else's as soon as this thread asks again."""
    size = numbers * dtype.itemsize
    found: Tensor | None = getattr(_kept, "room", None)
    if found is None or found.nbytes < size:
        found = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT:
            _kept.room = found
    return found
