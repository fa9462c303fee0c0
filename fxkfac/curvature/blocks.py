"""Blocks: the curvature of the parameters that belong together, as Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import FxkfacError
from fxkfac.linalg import kronecker_dense, kronecker_solve, require_regular

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Kronecker:
    """One Kronecker product A ⊗ B of a block, and where its entries are.

    Attributes:
        A: Input-based factor R Σ x̃ x̃ᵀ, of shape (in, in); (group, in, in) for several groups;
            (in,), its diagonal, for an embedding.
        B: Gradient-based factor of shape (out, out), or (group, out, out).
        entries: Numbers of the entries in the block, of shape (group, in, out).
    """

    A: Tensor
    B: Tensor
    plan: TermPlan = field(repr=False)
    offsets: dict[str, int] = field(repr=False)

    @property
    def entries(self) -> Tensor:
        """Numbers of the entries in the block's concatenated rvec, (group, in, out)."""
        return self.plan.entries(self.offsets)

    def grouped(self) -> tuple[Float[Tensor, "g i i"], Float[Tensor, "g o o"]]:
        """A and B with their group axis, A written out."""
        A = torch.diag_embed(self.A) if self.A.ndim == 1 else self.A
        return (A if A.ndim == 3 else A.unsqueeze(0)), (
            self.B if self.B.ndim == 3 else self.B.unsqueeze(0)
        )


@dataclass(frozen=True)
class Block:
    """The curvature of the parameters `params`: a sum of Kronecker products.

    Attributes:
        params: Names of the parameters, in the order of `dense`.
        shapes: Their shapes.
        terms: The Kronecker products; one, unless a weight is used in different orientations or
            parts.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    terms: tuple[Kronecker, ...]

    @property
    def A(self) -> Tensor:  # noqa: N802 - the field's name
        """Input-based factor, with all scaling done; see `Kronecker.A`."""
        return self._single().A

    @property
    def B(self) -> Tensor:  # noqa: N802 - the field's name
        """Gradient-based factor, with all scaling done; see `Kronecker.B`."""
        return self._single().B

    def _single(self) -> Kronecker:
        if len(self.terms) == 1:
            return self.terms[0]
        raise FxkfacError(
            f"the block of {', '.join(self.params)} is a sum of {len(self.terms)} Kronecker "
            "products, because the parameter is used in different orientations or parts; read "
            "A and B of each one in `block.terms`."
        )

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(torch.Size(s).numel() for s in self.shapes)

    def dense(self) -> Float[Tensor, "numel numel"]:
        """The block as a matrix over the parameters' concatenated rvec, as stored."""
        total = self.terms[0].B.new_zeros(self.numel, self.numel)
        for term in self.terms:
            for entries, product in zip(
                term.entries.to(total.device), kronecker_dense(*term.grouped()), strict=True
            ):
                e = entries.flatten()
                total.index_put_((e[:, None], e[None, :]), product, accumulate=True)
        return total

    def solve(self, vector: Float[Tensor, " numel"], damping: float) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector; exact, by eigenvalues for a single product."""
        if len(self.terms) > 1:
            eigenvalues, Q = torch.linalg.eigh(self.dense())
            require_regular(eigenvalues, damping)
            return Q @ ((Q.mT @ vector) / (eigenvalues.clamp_min(0) + damping))
        entries = self.terms[0].entries.to(vector.device)
        solution = kronecker_solve(*self.terms[0].grouped(), vector[entries], damping)
        return torch.empty_like(vector).index_put((entries,), solution)


@dataclass(frozen=True)
class Diagonal:
    """The exact diagonal of a block, for parameters without normal form.

    Attributes:
        params: The one parameter's name.
        shapes: Its shape.
        diagonal: R Σ_n Σ_c (∂ ⟨▲_{n,c}, f_n⟩ / ∂θ)², of the parameter's shape.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    diagonal: Tensor

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.diagonal.numel()

    def dense(self) -> Float[Tensor, "numel numel"]:
        """The diagonal as a matrix."""
        return torch.diag(self.diagonal.flatten())

    def solve(self, vector: Float[Tensor, " numel"], damping: float) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector."""
        require_regular(self.diagonal.flatten(), damping)
        return vector / (self.diagonal.flatten() + damping)
