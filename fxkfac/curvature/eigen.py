"""Blocks in eigenbases: C ≈ Σ (Q_A ⊗ Q_B) diag(Λ) (Q_A ⊗ Q_B)ᵀ, with Λ of their own (EKFAC)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxkfac.curvature.blocks import OfParameters, Term
from fxkfac.curvature.laid_out import laid_out
from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import BlockError
from fxkfac.linalg import operators
from fxkfac.linalg.operators import Operator
from fxkfac.linalg.operators.symmetric import rounded_squares


@dataclass(frozen=True)
class EigenTerm(Term):
    """One term of a block, a diagonal in its own eigenbasis, and where its entries are.

    Attributes:
        Q_A: Eigenvectors of A, in columns, (in, in); (group, in, in) for several groups; `None`,
            the identity, for an embedding.
        Q_B: Eigenvectors of B, (out, out) or (group, out, out).
        eigenvalues: Λ, (in, out) or (group, in, out).
    """

    Q_A: Tensor | None
    Q_B: Tensor
    eigenvalues: Tensor
    plan: TermPlan = field(repr=False)
    offsets: dict[str, int] = field(repr=False)

    @property
    def operator(self) -> operators.Eigenbasis:
        """Q diag(Λ) Qᵀ on arrays (group, in, out), with Λ that is zero where it is rounding."""
        Q_A = None if self.Q_A is None else _grouped(self.Q_A)
        Λ = rounded_squares(_grouped(self.eigenvalues))
        return operators.Eigenbasis(Q_A, _grouped(self.Q_B), Λ)


def _grouped(t: Tensor) -> Tensor:
    return t if t.ndim == 3 else t.unsqueeze(0)


@dataclass(frozen=True)
class EigenBlock(OfParameters):
    """The curvature of the parameters `params`: a diagonal in an orthonormal basis, or a sum.

    Attributes:
        terms: The diagonals; one, unless a weight is used in different orientations or parts.
    """

    terms: tuple[EigenTerm, ...]

    @property
    def Q_A(self) -> Tensor | None:  # noqa: N802 - the field's name
        """Eigenvectors of A; see `EigenTerm.Q_A`."""
        return self._single().Q_A

    @property
    def Q_B(self) -> Tensor:  # noqa: N802 - the field's name
        """Eigenvectors of B; see `EigenTerm.Q_B`."""
        return self._single().Q_B

    @property
    def eigenvalues(self) -> Tensor:
        """Λ, with all scaling done; see `EigenTerm.eigenvalues`."""
        return self._single().eigenvalues

    def _single(self) -> EigenTerm:
        if len(self.terms) == 1:
            return self.terms[0]
        raise BlockError(
            f"the block of {', '.join(self.params)} has {len(self.terms)} terms, each with a basis "
            "of its own; read that of each one in `block.terms`."
        )

    @property
    def operator(self) -> Operator:
        """The sum on vectors (numel,), the parameters' concatenated rvec as stored."""
        placed = [(term.operator, term.entries.to(term.Q_B.device)) for term in self.terms]
        return laid_out(placed, self.numel)
