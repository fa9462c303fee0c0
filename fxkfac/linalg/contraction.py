"""Rows -> sums over every datum's own gradient G_{n,c} = Σ_s x gᵀ, which none of them keeps.

    squares   Σ_n Σ_c (Q_Aᵀ G Q_B)²    (in, out)    EKFAC, George et al. 2018
    left      Σ_n Σ_c G B Gᵀ           (in, in)     a half step of power iteration,
    right     Σ_n Σ_c Gᵀ A G           (out, out)   and the other one (Van Loan and Pitsianis 1993)

Each is a product of several tensors, and which two go first decides what it costs: see `orders`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.orders import Order, Sizes, order_by_token, order_of_products, order_of_squares
from fxkfac.linalg.rows import DatumRows, Formed, Rows, TokenRows

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Squares:
    """Σ_n Σ_c (Q_Aᵀ G Q_B)², of shape (group, in, out).

    Attributes:
        Q_A: Orthogonal, (group, in, in), or (1, in, in) for all groups; `None` for the identity.
        Q_B: Orthogonal, (group, out, out).
    """

    Q_A: Tensor | None
    Q_B: Tensor

    @property
    def tokens(self) -> bool:
        """Whether A is a diagonal, so that one-hot rows need not be written out."""
        return self.Q_A is None

    def order(self, sizes: Sizes) -> Order:
        """The cheapest order."""
        return order_by_token(sizes) if self.tokens else order_of_squares(sizes)

    def of(self, rows: Rows) -> Tensor:
        """The sum over some data."""
        if isinstance(rows, TokenRows):
            each = _times(rows.g.unsqueeze(0), self.Q_B)[0].square().sum(1)
            return _by_token(rows, each).unsqueeze(0)
        if isinstance(rows, Formed):
            return self._squared(rows.G)
        assert self.Q_A is not None
        order = self.order(rows.sizes)
        x = _times(rows.x, self.Q_A) if order.x_first else rows.x
        g = _times(rows.g, self.Q_B) if order.g_first else rows.g
        if not order.forms:
            # Σ_c comes before the product: x is the same for all vectors.
            return x.squeeze(2).square().mT @ g.squeeze(2).square().sum(2)
        return self._squared(DatumRows(x, g).formed(), order.x_first, order.g_first)

    def _squared(self, G: Tensor, x_turned: bool = False, g_turned: bool = False) -> Tensor:
        G = G if g_turned else _times(G, self.Q_B)
        G = G if x_turned or self.Q_A is None else _from_left(self.Q_A.mT, G)
        return G.square().sum((1, 3))


@dataclass(frozen=True)
class Left:
    """Σ_n Σ_c G B Gᵀ, of shape (group, in, in); of one-hot rows its diagonal alone, (in,).

    Attributes:
        B: Symmetric, (group, out, out).
        tokens: Whether A is a diagonal, so that one-hot rows need not be written out.
    """

    B: Tensor
    tokens: bool = False

    def order(self, sizes: Sizes) -> Order:
        """The cheapest order."""
        return order_by_token(sizes) if self.tokens else order_of_products(sizes)

    def of(self, rows: Rows) -> Tensor:
        """The sum over some data."""
        if isinstance(rows, TokenRows):
            each = (_times(rows.g.unsqueeze(0), self.B)[0] * rows.g).sum((1, 2))
            return _by_token(rows, each)
        if isinstance(rows, Formed) or self.order(rows.sizes).forms:
            G = rows.formed()
            turned = _times(G, self.B)
            if self.tokens:
                return (turned * G).sum((0, 1, 3, 4))
            return torch.einsum("gnivo,gnjvo->gij", turned, G)
        M = _times(rows.g, self.B).flatten(3) @ rows.g.flatten(3).mT  # g B gᵀ
        product = M @ rows.x
        x = rows.x.expand(len(product), -1, -1, -1)
        return x.flatten(1, 2).mT @ product.flatten(1, 2)


@dataclass(frozen=True)
class Right:
    """Σ_n Σ_c Gᵀ A G, of shape (group, out, out).

    Attributes:
        A: Symmetric, (group, in, in); or its diagonal (in,), for one-hot rows.
    """

    A: Tensor

    @property
    def tokens(self) -> bool:
        """Whether A is a diagonal, so that one-hot rows need not be written out."""
        return self.A.ndim == 1

    def order(self, sizes: Sizes) -> Order:
        """The cheapest order."""
        return order_by_token(sizes) if self.tokens else order_of_products(sizes)

    def of(self, rows: Rows) -> Tensor:
        """The sum over some data."""
        if isinstance(rows, TokenRows):
            scaled = self.A[rows.tokens].view(-1, 1, 1) * rows.g
            return (scaled.flatten(0, 1).mT @ rows.g.flatten(0, 1)).unsqueeze(0)
        if isinstance(rows, Formed) or self.order(rows.sizes).forms:
            G = rows.formed()
            return torch.einsum("gnivo,gnivp->gop", G, _from_left(self.A, G))
        P = _times(rows.x, self.A) @ rows.x.mT  # x A xᵀ
        product = (P @ rows.g.flatten(3)).unflatten(-1, rows.g.shape[3:])
        g = rows.g.expand(len(product), -1, -1, -1, -1)
        return g.flatten(1, 3).mT @ product.flatten(1, 3)


Statistic = Squares | Left | Right


def _times(
    rows: Float[Tensor, "group *rows d"], factor: Float[Tensor, "group d d"]
) -> Float[Tensor, "group *rows d"]:
    """Every row times the matrix of its group."""
    product = rows.flatten(1, -2) @ factor
    return product.view(len(product), *rows.shape[1:])


def _from_left(
    factor: Float[Tensor, "group d_in d_in"] | Float[Tensor, " d_in"],
    G: Float[Tensor, "group n d_in c d_out"],
) -> Float[Tensor, "group n d_in c d_out"]:
    """The matrix of its group, or the one diagonal, times every G."""
    if factor.ndim == 1:
        return factor.view(-1, 1, 1) * G
    groups = max(len(factor), len(G))
    factor, G = factor.expand(groups, -1, -1), G.expand(groups, -1, -1, -1, -1)
    return torch.einsum("gij,gnjvo->gnivo", factor, G)


def _by_token(rows: TokenRows, each: Float[Tensor, "rows ..."]) -> Float[Tensor, "size ..."]:
    """What each row gives, summed over the rows of one token."""
    return each.new_zeros(rows.size, *each.shape[1:]).index_add(0, rows.tokens, each)
