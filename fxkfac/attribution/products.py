"""Rows of every datum -> products of its gradient with others, which are formed only if that pays.

    G_n = Σ_s x̃ gᵀ        ⟨G_n, P_m⟩ = Σ_s x̃ᵀ P_m g

Either the rows meet P one by one, or G is formed for some data at a time: whichever takes fewer
multiply-adds. P is what the gradients of other data have become. One vector has gone back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.rows import DatumRows, Rows, TokenRows, chunks, room

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def own(rows: Rows) -> Float[Tensor, "n group d_in d_out"]:
    """Every datum's gradient."""
    return rows.formed().squeeze(3).movedim(1, 0)


def own_at(rows: TokenRows, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "n chosen d_out"]:
    """Its rows that belong to some tokens, in ascending order."""
    return rows.formed_at(chosen).squeeze(2)


def products(rows: Rows, P: Float[Tensor, "m group d_in d_out"]) -> Float[Tensor, "n m"]:
    """⟨G_n, P_m⟩ for all pairs."""
    m, numel = len(P), P[0].numel()
    if isinstance(rows, DatumRows):
        shared, (groups, _, d_out) = rows.sizes.shared, P.shape[1:]
        if shared * m <= shared + m:  # multiply-adds of either, over d_in · d_out
            return _by_chunks(rows, lambda r: _row_by_row(r, P), groups * shared * m * d_out)
    flat = P.flatten(1).mT
    return _by_chunks(rows, lambda r: own(r).flatten(1) @ flat, numel)


def products_at(
    rows: TokenRows, P: Float[Tensor, "m chosen d_out"], chosen: Int[Tensor, " chosen"]
) -> Float[Tensor, "n m"]:
    """The same where P is zero for all tokens but some."""
    flat = P.flatten(1).mT
    return _by_chunks(rows, lambda r: own_at(r, chosen).flatten(1) @ flat, len(flat))


def _row_by_row(rows: DatumRows, P: Tensor) -> Tensor:
    """With every row by itself: no gradient is formed."""
    met = torch.einsum("gnsi,mgio->gnsmo", rows.x, P)
    return torch.einsum("gnsmo,gnso->nm", met, rows.g.squeeze(3))


def _by_chunks(rows: Rows, of: Callable[..., Tensor], numbers: int) -> Tensor:
    """Of some data at a time, for each of which `numbers` are held."""
    size = room() // max(numbers, 1)
    return torch.cat([of(rows.some(*part)) for part in chunks(rows.n, size)])
