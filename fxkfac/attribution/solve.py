"""Factors and damping -> (C + λ I)⁻¹ for many gradients at once, block by block.

The eigenvalues of a block are found once; what is solved keeps the form of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.attribution.rows import Formed, Rows, TokenRows
from fxkfac.curvature.blocks import Block, Dense, Kronecker
from fxkfac.curvature.curvature import AnyBlock, Curvature
from fxkfac.curvature.eigen import EigenBlock, EigenTerm
from fxkfac.errors import UnsupportedUse
from fxkfac.linalg import require_regular

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LARGEST_BLOCK = 2**28  # numbers in a matrix that is written out: 1 GiB in float32


@dataclass(frozen=True)
class Solved:
    """(C + λ I)⁻¹ G_m of some data, in the form of one term's gradients.

    Attributes:
        P: (m, group, in, out); (m, chosen, out) for tokens; (m, numel) for an exact block.
        chosen: The tokens whose rows P holds.
    """

    P: Tensor
    chosen: Int[Tensor, " chosen"] | None = None

    def products(self, rows: Rows | TokenRows | Formed) -> Float[Tensor, "n m"]:
        """⟨G_n, P_m⟩ for all pairs."""
        if isinstance(rows, Formed):
            return rows.G @ self.P.mT
        if isinstance(rows, Rows):
            return rows.products(self.P)
        assert self.chosen is not None
        return rows.products(self.P, self.chosen)


@dataclass(frozen=True)
class Eigenbasis:
    """The inverse of one term by itself, Q diag(1 / (Λ + λ)) Qᵀ with Q = Q_A ⊗ Q_B.

    Attributes:
        Q_A: (group, in, in); `None` for the identity, where inputs are one-hot.
        Q_B: (group, out, out).
        inverse: 1 / (Λ + λ), (group, in, out).
    """

    Q_A: Tensor | None
    Q_B: Tensor
    inverse: Tensor

    @staticmethod
    def of(term: Kronecker | EigenTerm, damping: float) -> Eigenbasis:
        """Λ as corrected, or Λ_A Λ_B. Raises `OptionError` if it is singular without damping."""
        if isinstance(term, EigenTerm):
            Q_A = None if term.Q_A is None else _grouped(term.Q_A)
            return Eigenbasis(Q_A, _grouped(term.Q_B), _inverse(term.grouped(), damping))
        lambda_B, Q_B = torch.linalg.eigh(_grouped(term.B))
        if term.A.ndim == 1:
            lambda_A, Q_A = term.A.unsqueeze(0), None
        else:
            lambda_A, Q_A = torch.linalg.eigh(_grouped(term.A))
        # Positive semi-definite by construction: what is below zero is rounding.
        eigenvalues = lambda_A.clamp_min(0).unsqueeze(-1) * lambda_B.clamp_min(0).unsqueeze(-2)
        return Eigenbasis(Q_A, Q_B, _inverse(eigenvalues, damping))

    def solve(self, rows: Rows | TokenRows) -> Solved:
        """For the gradients of some data; those of one-hot rows for their own tokens alone."""
        if isinstance(rows, Rows):
            return Solved(self._solve(rows.formed()))
        if self.Q_A is not None:  # rows were summed before A was, which is then no diagonal
            chosen = torch.arange(self.inverse.shape[1], device=self.inverse.device)
            return Solved(self._solve(rows.formed(chosen).unsqueeze(1))[:, 0], chosen)
        chosen = rows.tokens.unique()
        rotated = rows.formed(chosen) @ self.Q_B[0]
        return Solved((rotated * self.inverse[0, chosen]) @ self.Q_B[0].mT, chosen)

    def _solve(self, G: Float[Tensor, "m group d_in d_out"]) -> Tensor:
        if self.Q_A is None:
            return (G @ self.Q_B * self.inverse) @ self.Q_B.mT
        return self.Q_A @ ((self.Q_A.mT @ G @ self.Q_B) * self.inverse) @ self.Q_B.mT


@dataclass(frozen=True)
class Terms:
    """The inverse of a block whose terms have no entry in common."""

    bases: tuple[Eigenbasis, ...]

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient."""
        return sum(basis.inverse.numel() for basis in self.bases)

    def solve(self, rows: list[Rows | TokenRows]) -> list[Solved]:
        """For each term by itself."""
        return [basis.solve(r) for basis, r in zip(self.bases, rows, strict=True)]


@dataclass(frozen=True)
class Whole:
    """The inverse of a block whose terms overlap, Q diag(inverse) Qᵀ.

    Attributes:
        entries: For every term, where its entries are, (group, in, out).
    """

    Q: Float[Tensor, "numel numel"]
    inverse: Float[Tensor, " numel"]
    entries: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient, and in what its terms have of it."""
        return len(self.Q) + sum(entries.numel() for entries in self.entries)

    def solve(self, rows: list[Rows | TokenRows]) -> list[Solved]:
        """For the gradients of all terms together."""
        G = self.Q.new_zeros(len(rows[0]), len(self.Q))
        for r, entries in zip(rows, self.entries, strict=True):
            tokens = torch.arange(entries.shape[1], device=entries.device)
            part = r.formed(tokens) if isinstance(r, TokenRows) else r.formed()
            G = G.index_add(1, entries.flatten(), part.flatten(1).to(G.dtype))
        P = ((G @ self.Q) * self.inverse) @ self.Q.mT
        found = []
        for r, entries in zip(rows, self.entries, strict=True):
            if isinstance(r, TokenRows):
                tokens = torch.arange(entries.shape[1], device=entries.device)
                found.append(Solved(P[:, entries[0]], tokens))
            else:
                found.append(Solved(P[:, entries]))
        return found


@dataclass(frozen=True)
class Exact:
    """The inverse of an exact block: of a diagonal (numel,), or Q diag(inverse) Qᵀ."""

    inverse: Float[Tensor, " numel"]
    Q: Tensor | None = None

    @property
    def numel(self) -> int:
        """Numbers in one datum's gradient."""
        return len(self.inverse)

    def solve(self, rows: Formed) -> Solved:
        """For the gradients of some data."""
        G = rows.G.to(self.inverse.dtype)
        if self.Q is None:
            return Solved(G * self.inverse)
        return Solved(((G @ self.Q) * self.inverse) @ self.Q.mT)


Solver = Terms | Whole | Exact


def solvers_of(factors: Curvature, damping: float) -> Mapping[str, Solver]:
    """The inverse of every block.

    Raises:
        OptionError: The damping is negative, or zero where a block is singular.
        UnsupportedUse: The terms of a block overlap, and it is too large to be written out.
    """
    return {name: _solver(block, damping) for name, block in factors.items()}


def _solver(block: AnyBlock, damping: float) -> Solver:
    if isinstance(block, EigenBlock):
        return Terms(tuple(Eigenbasis.of(term, damping) for term in block.terms))
    if isinstance(block, Block):
        numbers = torch.cat([term.entries.flatten() for term in block.terms])
        if len(numbers.unique()) == len(numbers):
            return Terms(tuple(Eigenbasis.of(term, damping) for term in block.terms))
        return _whole(block, damping)
    if isinstance(block, Dense):
        eigenvalues, Q = torch.linalg.eigh(block.matrix)
        return Exact(_inverse(eigenvalues.clamp_min(0), damping), Q)
    return Exact(_inverse(block.diagonal.flatten(), damping))


def _whole(block: Block, damping: float) -> Whole:
    if block.numel**2 > LARGEST_BLOCK:
        raise UnsupportedUse(
            f"{', '.join(block.params)}: the same entries are used in different orientations or "
            f"parts, and the block as one matrix would hold {block.numel**2:,} numbers; expected "
            f"at most {LARGEST_BLOCK:,}. Trace with structure={{{block.params[0]!r}: 'diagonal'}}."
        )
    eigenvalues, Q = torch.linalg.eigh(block.dense())
    entries = tuple(term.entries.to(Q.device) for term in block.terms)
    return Whole(Q, _inverse(eigenvalues.clamp_min(0), damping), entries)


def _grouped(t: Tensor) -> Tensor:
    return t if t.ndim == 3 else t.unsqueeze(0)


def _inverse(eigenvalues: Tensor, damping: float) -> Tensor:
    require_regular(eigenvalues.flatten(), damping)
    return 1 / (eigenvalues + damping)
