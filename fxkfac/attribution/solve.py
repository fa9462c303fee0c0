"""Factors and damping -> (C + λ I)⁻¹ for many gradients at once, block by block.

The eigenvalues of a block are found once; what is solved keeps the form of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.attribution.products import own, own_at, products, products_at
from fxkfac.curvature.blocks import Block, Kronecker
from fxkfac.curvature.curvature import AnyBlock, Curvature
from fxkfac.curvature.eigen import EigenBlock, EigenTerm
from fxkfac.errors import UnsupportedUse
from fxkfac.linalg import operators
from fxkfac.linalg.operators import Damping, Eigenbasis, Operator
from fxkfac.linalg.operators.entries import LARGEST_DENSE
from fxkfac.linalg.rows import Rows, TokenRows

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Solved:
    """(C + λ I)⁻¹ G_m of some data, in the form of one term's gradients.

    Attributes:
        P: (m, group, in, out); (m, chosen, out) for tokens; (m, 1, numel, 1) for an exact block.
        chosen: The tokens whose rows P holds.
    """

    P: Tensor
    chosen: Int[Tensor, " chosen"] | None = None

    def products(self, rows: Rows) -> Float[Tensor, "n m"]:
        """⟨G_n, P_m⟩ for all pairs."""
        if isinstance(rows, TokenRows) and self.chosen is not None:
            return products_at(rows, self.P, self.chosen)
        return products(rows, self.P)


@dataclass(frozen=True)
class Term:
    """The inverse of one term by itself, Q diag(1 / (Λ + λ)) Qᵀ with Q = Q_A ⊗ Q_B."""

    inverse: Eigenbasis

    @staticmethod
    def of(term: Kronecker | EigenTerm, damping: float) -> Term:
        """Λ as corrected, or Λ_A Λ_B. Raises `OptionError` if it is singular without damping."""
        inverse = _inverse(term.operator, damping)
        assert isinstance(inverse, Eigenbasis)
        return Term(inverse)

    def solve(self, rows: Rows) -> Solved:
        """For the gradients of some data; those of one-hot rows for their own tokens alone."""
        basis = self.inverse
        # Where rows were summed before A was, that is no diagonal: all tokens have a share.
        if not isinstance(rows, TokenRows) or basis.Q_A is not None:
            return Solved(operators.product(basis, own(rows)))
        assert basis.Q_B is not None
        chosen, Q_B = rows.tokens.unique(), basis.Q_B[0]
        return Solved((own_at(rows, chosen) @ Q_B * basis.eigenvalues[0, chosen]) @ Q_B.mT, chosen)


@dataclass(frozen=True)
class Terms:
    """The inverse of a block whose terms have no entry in common."""

    bases: tuple[Term, ...]

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient."""
        return sum(basis.inverse.numel for basis in self.bases)

    def solve(self, rows: list[Rows]) -> list[Solved]:
        """For each term by itself."""
        return [basis.solve(r) for basis, r in zip(self.bases, rows, strict=True)]


@dataclass(frozen=True)
class Whole:
    """The inverse of a block whose terms overlap.

    Attributes:
        inverse: On vectors (numel,).
        entries: For every term, where its entries are, (group, in, out).
    """

    inverse: Operator
    entries: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient, and in what its terms have of it."""
        return self.inverse.numel + sum(entries.numel() for entries in self.entries)

    def solve(self, rows: list[Rows]) -> list[Solved]:
        """For the gradients of all terms together."""
        G = self.inverse.like.new_zeros(rows[0].n, self.inverse.numel)
        for r, entries in zip(rows, self.entries, strict=True):
            G = G.index_add(1, entries.flatten(), own(r).flatten(1).to(G.dtype))
        P = operators.product(self.inverse, G)
        return [Solved(P[:, entries]) for entries in self.entries]


@dataclass(frozen=True)
class Exact:
    """The inverse of an exact block, on vectors (numel,)."""

    inverse: Operator

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient."""
        return self.inverse.numel

    def solve(self, rows: list[Rows]) -> list[Solved]:
        """For the gradients of some data, of the one kind that there is."""
        (r,) = rows
        G = own(r).flatten(1).to(self.inverse.like.dtype)
        return [Solved(operators.product(self.inverse, G).view(r.n, 1, -1, 1))]


Solver = Terms | Whole | Exact


def solvers_of(factors: Curvature, damping: float) -> Mapping[str, Solver]:
    """The inverse of every block.

    Raises:
        OptionError: The damping is negative, or zero where a block is singular.
        UnsupportedUse: The terms of a block overlap, and it is too large to be written out.
    """
    return {name: _solver(block, damping) for name, block in factors.items()}


def _solver(block: AnyBlock, damping: float) -> Solver:
    if isinstance(block, Block | EigenBlock):
        numbers = torch.cat([term.entries.flatten() for term in block.terms])
        if len(numbers.unique()) == len(numbers):
            return Terms(tuple(Term.of(term, damping) for term in block.terms))
        return _whole(block, damping)
    return Exact(_inverse(block.operator, damping))


def _whole(block: Block | EigenBlock, damping: float) -> Whole:
    if block.numel**2 > LARGEST_DENSE:
        raise UnsupportedUse(
            f"{', '.join(block.params)}: the same entries are used in different orientations or "
            f"parts, and the block as one matrix would hold {block.numel**2:,} numbers; expected "
            f"at most {LARGEST_DENSE:,}. Trace with structure={{{block.params[0]!r}: 'diagonal'}}."
        )
    entries = tuple(term.entries.to(term.operator.device) for term in block.terms)
    return Whole(_inverse(block.operator, damping), entries)


def _inverse(operator: Operator, damping: float) -> Operator:
    return operators.power(operators.damped(operator, Damping(damping)), -1)
