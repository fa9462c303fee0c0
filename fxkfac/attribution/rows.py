"""Rows of every datum -> products of its gradient with others, which are formed only if that pays.

    G_n = Σ_s x̃ gᵀ        ⟨G_n, P_m⟩ = Σ_s x̃ᵀ P_m g

Either the rows meet P one by one, or G is formed for some data at a time: whichever takes fewer
multiply-adds. P is what the gradients of other data have become, of G's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LARGEST_CHUNK = 2**24  # numbers in what is formed at once


@dataclass(frozen=True)
class Rows:
    """Inputs and gradients of some data, with so many rows for each."""

    x: Float[Tensor, "group n shared d_in"]
    g: Float[Tensor, "group n shared d_out"]

    def __len__(self) -> int:
        return self.g.shape[1]

    def some(self, start: int, size: int) -> Rows:
        """The rows of some of the data."""
        return Rows(self.x.narrow(1, start, size), self.g.narrow(1, start, size))

    def formed(self) -> Float[Tensor, "n group d_in d_out"]:
        """G_n = Σ_s x gᵀ of every datum."""
        return (self.x.mT @ self.g).movedim(1, 0)

    def products(self, P: Float[Tensor, "m group d_in d_out"]) -> Float[Tensor, "n m"]:
        """⟨G_n, P_m⟩ for all pairs."""
        groups, _, shared, d_in = self.x.shape
        d_out, m = self.g.shape[-1], len(P)
        if shared * m > shared + m:  # multiply-adds of either, over d_in · d_out
            return _by_chunks(self._formed_products(P), len(self), groups * d_in * d_out)
        return _by_chunks(self._row_products(P), len(self), groups * shared * m * d_out)

    def _formed_products(self, P: Tensor) -> Callable[[int, int], Tensor]:
        """With G formed."""
        flat = P.flatten(1).mT
        return lambda start, size: self.some(start, size).formed().flatten(1) @ flat

    def _row_products(self, P: Tensor) -> Callable[[int, int], Tensor]:
        """With every row by itself: no gradient is formed."""

        def products(start: int, size: int) -> Tensor:
            rows = self.some(start, size)
            met = torch.einsum("gnsi,mgio->gnsmo", rows.x, P)
            return torch.einsum("gnsmo,gnso->nm", met, rows.g)

        return products


@dataclass(frozen=True)
class TokenRows:
    """The same where inputs are one-hot."""

    tokens: Int[Tensor, "n shared"]
    g: Float[Tensor, "n shared d_out"]

    def __len__(self) -> int:
        return len(self.g)

    def some(self, start: int, size: int) -> TokenRows:
        """The rows of some of the data."""
        return TokenRows(self.tokens.narrow(0, start, size), self.g.narrow(0, start, size))

    def formed(self, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "n chosen d_out"]:
        """The rows of G_n that belong to some tokens, in ascending order."""
        at = torch.searchsorted(chosen, self.tokens).clamp_max(len(chosen) - 1)
        g = self.g * (chosen[at] == self.tokens).unsqueeze(-1)
        G = g.new_zeros(len(g), len(chosen), g.shape[-1])
        return G.scatter_add(1, at.unsqueeze(-1).expand_as(g), g)

    def products(
        self, P: Float[Tensor, "m chosen d_out"], chosen: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "n m"]:
        """⟨G_n, P_m⟩ for all pairs, where P is zero for all other tokens."""
        flat = P.flatten(1).mT

        def products(start: int, size: int) -> Tensor:
            return self.some(start, size).formed(chosen).flatten(1) @ flat

        return _by_chunks(products, len(self), len(flat))


@dataclass(frozen=True)
class Formed:
    """Gradients of one parameter that are formed: those of scales, which are small."""

    G: Float[Tensor, "n numel"]

    def __len__(self) -> int:
        return len(self.G)

    def some(self, start: int, size: int) -> Formed:
        """Those of some of the data."""
        return Formed(self.G.narrow(0, start, size))


def chunks(n: int, numbers: int, largest: int) -> Iterator[tuple[int, int]]:
    """(start, size) of parts of the data: `numbers` for each datum are `largest` at most."""
    size = max(1, largest // max(numbers, 1))
    for start in range(0, n, size):
        yield start, min(size, n - start)


def _by_chunks(products: Callable[[int, int], Tensor], n: int, numbers: int) -> Tensor:
    parts = [products(start, size) for start, size in chunks(n, numbers, LARGEST_CHUNK)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
