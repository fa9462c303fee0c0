"""Blocks: the curvature of the parameters that belong together, as Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import FxkfacError
from fxkfac.linalg import (
    damped,
    kronecker_dense,
    kronecker_solve,
    kronecker_sum_solve,
    require_positive,
    require_regular,
)

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Kronecker:
    """One Kronecker product A ⊗ B of a block, and where its entries are.

    A and B are those that the factors hold, and equal inputs have one A: copy before changing one.

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
        A = A if A.ndim == 3 else A.unsqueeze(0)
        B = self.B if self.B.ndim == 3 else self.B.unsqueeze(0)
        return A.expand(len(B), -1, -1), B  # parts that were taken apart share their input


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

    def solve(
        self, vector: Float[Tensor, " numel"], damping: float, damp: str = "block"
    ) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector; exact, by eigenvalues for a single product.

        With `damp="factors"` √damping · I is added to both factors of every term instead; one
        product, or a sum of two, is then inverted exactly without being written out.
        """
        if damp == "factors":
            return self._solve_factors(vector, damping)
        if len(self.terms) > 1:
            eigenvalues, Q = torch.linalg.eigh(self.dense())
            require_regular(eigenvalues, damping)
            return Q @ ((Q.mT @ vector) / (eigenvalues.clamp_min(0) + damping))
        entries = self.terms[0].entries.to(vector.device)
        solution = kronecker_solve(*self.terms[0].grouped(), vector[entries], damping)
        return torch.empty_like(vector).index_put((entries,), solution)

    def _solve_factors(self, vector: Tensor, damping: float) -> Tensor:
        require_positive(damping)
        entries = self.terms[0].entries
        factors = [laid_out(term, entries, self.params) for term in self.terms]
        pairs = [(damped(A, damping), damped(B, damping)) for A, B in factors]
        G = vector[entries.to(vector.device)]
        if len(pairs) == 1:
            solution = kronecker_solve(*pairs[0], G, 0.0)
        elif len(pairs) == 2:
            solution = kronecker_sum_solve(pairs[0], pairs[1], G)
        else:
            raise FxkfacError(
                f"the block of {', '.join(self.params)} is a sum of {len(pairs)} Kronecker "
                "products; expected at most two for damp='factors'. Use damp='block'."
            )
        return torch.empty_like(vector).index_put((entries.to(vector.device),), solution)


def laid_out(term: Kronecker, entries: Tensor, params: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """A and B of a term, as factors of a matrix whose entries lie as in another term."""
    A, B = term.grouped()
    if term.entries.equal(entries):
        return A, B
    if term.entries.mT.equal(entries):  # the weight is used the other way round, too
        return B, A
    raise FxkfacError(
        f"the Kronecker products of the block of {', '.join(params)} are of different parts of "
        "the parameter, so that their factors do not add up; use damp='block', or compute all "
        "of them with separate_weight_and_bias=True."
    )


@dataclass(frozen=True)
class Diagonal:
    """The exact diagonal of a block; or the identity, where that was asked for.

    Attributes:
        params: The one parameter's name.
        shapes: Its shape.
        diagonal: R Σ_n Σ_c (∂ ⟨▲_{n,c}, f_n⟩ / ∂θ)², of the parameter's shape; or ones.
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

    def solve(
        self, vector: Float[Tensor, " numel"], damping: float, damp: str = "block"
    ) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector; there are no factors that could be damped instead."""
        require_regular(self.diagonal.flatten(), damping)
        return vector / (self.diagonal.flatten() + damping)


@dataclass(frozen=True)
class Dense:
    """One parameter's exact block.

    Attributes:
        params: The one parameter's name.
        shapes: Its shape.
        matrix: R Σ_n Σ_c vec(G_{n,c}) vec(G_{n,c})ᵀ over the parameter's rvec, as stored.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    matrix: Tensor

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return len(self.matrix)

    def dense(self) -> Float[Tensor, "numel numel"]:
        """The matrix."""
        return self.matrix

    def solve(
        self, vector: Float[Tensor, " numel"], damping: float, damp: str = "block"
    ) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector; there are no factors that could be damped instead."""
        eigenvalues, Q = torch.linalg.eigh(self.matrix)
        require_regular(eigenvalues, damping)
        return Q @ ((Q.mT @ vector) / (eigenvalues.clamp_min(0) + damping))
