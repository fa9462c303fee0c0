"""Blocks in an eigenbasis: C ≈ (Q_A ⊗ Q_B) diag(Λ) (Q_A ⊗ Q_B)ᵀ, with Λ of its own (EKFAC)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import FxkfacError
from fxkfac.linalg import require_regular

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class EigenTerm:
    """One part of a block in its own eigenbasis, and where its entries are.

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
    def entries(self) -> Tensor:
        """Numbers of the entries in the block's concatenated rvec, (group, in, out)."""
        return self.plan.entries(self.offsets)

    def scaled(self, vector: Tensor, scale: Float[Tensor, "group d_in d_out"]) -> Tensor:
        """Q (scale · Qᵀ V) for the entries V of a vector, laid out as (group, in, out)."""
        V = vector[self.entries.to(vector.device)]
        Q_B = self._grouped(self.Q_B)
        rotated = self._from_left(V, transpose=True) @ Q_B
        return self._from_left(rotated * scale, transpose=False) @ Q_B.mT

    def grouped(self) -> Float[Tensor, "group d_in d_out"]:
        """Λ with its group axis."""
        return self._grouped(self.eigenvalues)

    def _from_left(self, V: Tensor, transpose: bool) -> Tensor:
        if self.Q_A is None:
            return V
        Q_A = self._grouped(self.Q_A)
        return (Q_A.mT if transpose else Q_A) @ V

    @staticmethod
    def _grouped(t: Tensor) -> Tensor:
        return t if t.ndim == 3 else t.unsqueeze(0)

    def dense(self) -> Float[Tensor, "group d_in_d_out d_in_d_out"]:
        """Q diag(Λ) Qᵀ for every group."""
        Q_B, scale = self._grouped(self.Q_B), self.grouped()
        groups, d_in, d_out = scale.shape
        if self.Q_A is None:
            blocks = torch.einsum("gop,gip,gqp->gioq", Q_B, scale, Q_B)
            each = torch.stack([torch.block_diag(*group) for group in blocks])
            return each
        Q_A = self._grouped(self.Q_A).expand(groups, -1, -1)
        Q = torch.einsum("gij,gop->giojp", Q_A, Q_B.expand(groups, -1, -1))
        Q = Q.reshape(groups, d_in * d_out, d_in * d_out)
        return (Q * scale.flatten(1).unsqueeze(1)) @ Q.mT


@dataclass(frozen=True)
class EigenBlock:
    """The curvature of the parameters `params`: a diagonal in an orthonormal basis.

    Attributes:
        params: Names of the parameters, in the order of `dense`.
        shapes: Their shapes.
        terms: One for each part of the parameters; no two have an entry in common.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
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
        raise FxkfacError(
            f"the block of {', '.join(self.params)} has {len(self.terms)} parts, each with a basis "
            "of its own; read that of each one in `block.terms`."
        )

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(torch.Size(s).numel() for s in self.shapes)

    def dense(self) -> Float[Tensor, "numel numel"]:
        """The block as a matrix over the parameters' concatenated rvec, as stored."""
        total = self.terms[0].Q_B.new_zeros(self.numel, self.numel)
        for term in self.terms:
            for entries, matrix in zip(term.entries.to(total.device), term.dense(), strict=True):
                e = entries.flatten()
                total[e[:, None], e[None, :]] = matrix
        return total

    def solve(
        self, vector: Float[Tensor, " numel"], damping: float, damp: str = "block"
    ) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector; there are no factors that could be damped instead."""
        eigenvalues = torch.cat([t.eigenvalues.flatten() for t in self.terms])
        rest = eigenvalues.new_zeros(self.numel - len(eigenvalues))  # entries without curvature
        require_regular(torch.cat([eigenvalues, rest]), damping)
        solution = vector / damping if len(rest) else torch.empty_like(vector)
        for term in self.terms:
            found = term.scaled(vector, 1 / (term.grouped() + damping))
            solution = solution.index_put((term.entries.to(vector.device),), found)
        return solution
