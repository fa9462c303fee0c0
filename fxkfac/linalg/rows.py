"""Rows of some data: what every datum's own gradients are made of, formed only where that pays.

    G_{n,c} = Σ_s x gᵀ

c stands for the vectors that went back: each gives a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.orders import Sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LARGEST_CHUNK = 2**24  # numbers in the gradients that are held at once


@dataclass(frozen=True)
class DatumRows:
    """Inputs and gradients of some data, with so many rows for each."""

    x: Float[Tensor, "group n shared d_in"]
    g: Float[Tensor, "group n shared c d_out"]

    @property
    def n(self) -> int:
        """Number of data."""
        return self.g.shape[1]

    @property
    def sizes(self) -> Sizes:
        """Lengths of the axes."""
        _, _, shared, vectors, d_out = self.g.shape
        return Sizes(shared, vectors, self.x.shape[-1], d_out)

    def some(self, start: int, size: int) -> DatumRows:
        """The rows of some of the data."""
        return DatumRows(self.x.narrow(1, start, size), self.g.narrow(1, start, size))

    def formed(self) -> Float[Tensor, "group n d_in c d_out"]:
        """G of every datum and vector."""
        return torch.einsum("gnsi,gnsco->gnico", self.x, self.g)


@dataclass(frozen=True)
class TokenRows:
    """The same where inputs are one-hot: the rows of G that are not zero.

    Attributes:
        places: For each, k · size + i where it is row i of datum k's G; in order, no two are equal.
        g: The rows.
        size: How many rows G has.
        n: Number of data.
    """

    places: Int[Tensor, " rows"]
    g: Float[Tensor, "rows c d_out"]
    size: int
    n: int

    @property
    def tokens(self) -> Int[Tensor, " rows"]:
        """For each, which row of its datum's G it is."""
        return self.places.remainder(self.size)

    def some(self, start: int, size: int) -> TokenRows:
        """The rows of some of the data."""
        ends = self.places.new_tensor([start, start + size]) * self.size
        first, last = torch.searchsorted(self.places, ends).tolist()
        places = self.places[first:last] - start * self.size
        return TokenRows(places, self.g[first:last], self.size, size)

    def formed(self) -> Float[Tensor, "1 n size c d_out"]:
        """G of every datum and vector."""
        G = self.g.new_zeros(self.n * self.size, *self.g.shape[1:])
        G = G.index_copy(0, self.places, self.g)
        return G.view(1, self.n, self.size, *self.g.shape[1:])

    def formed_at(self, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "n chosen c d_out"]:
        """Those rows of G that belong to some tokens, in ascending order."""
        tokens = self.tokens
        at = torch.searchsorted(chosen, tokens).clamp_max(len(chosen) - 1)
        g = self.g * (chosen[at] == tokens).view(-1, 1, 1)
        datum = self.places.div(self.size, rounding_mode="floor")
        G = g.new_zeros(self.n * len(chosen), *g.shape[1:])
        return G.index_add(0, datum * len(chosen) + at, g).view(self.n, -1, *g.shape[1:])


@dataclass(frozen=True)
class Formed:
    """The gradients themselves, where each is a sum over several kinds of rows."""

    G: Float[Tensor, "group n d_in c d_out"]

    @property
    def n(self) -> int:
        """Number of data."""
        return self.G.shape[1]

    def some(self, start: int, size: int) -> Formed:
        """Those of some of the data."""
        return Formed(self.G.narrow(1, start, size))

    def formed(self) -> Float[Tensor, "group n d_in c d_out"]:
        """They are."""
        return self.G


Rows = DatumRows | TokenRows | Formed


def room(parts: int = 1) -> int:
    """The numbers that each of so many parts may hold at once."""
    return LARGEST_CHUNK // parts


def chunks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, size) of so many data at a time, one at least."""
    for start in range(0, n, max(size, 1)):
        yield start, min(max(size, 1), n - start)
