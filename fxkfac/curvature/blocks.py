"""Blocks: the curvature of the parameters that belong together, as Kronecker products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.laid_out import laid_out
from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import BlockError
from fxkfac.linalg import operators
from fxkfac.linalg.operators import BlockDiagonal, Damping, Operator

if TYPE_CHECKING:
    from jaxtyping import Float


class Term:
    """One part of a block, and where its entries are."""

    plan: TermPlan
    offsets: dict[str, int]

    @property
    def entries(self) -> Tensor:
        """Numbers of the entries in the block's concatenated rvec, (group, in, out)."""
        return self.plan.entries(self.offsets)


@dataclass(frozen=True)
class Kronecker(Term):
    """One Kronecker product A ⊗ B of a block, and where its entries are.

    A and B are those that the factors hold, and equal inputs have one A: copy before changing one.

    Attributes:
        A: Input-based factor R Σ x̃ x̃ᵀ (paper, Equation 4b), of shape (in, in); (group, in, in) for
            several groups; (in,), its diagonal, for an embedding.
        B: Gradient-based factor (Equation 4c) of shape (out, out), or (group, out, out).
        entries: Numbers of the entries in the block, of shape (group, in, out).
    """

    A: Tensor
    B: Tensor
    plan: TermPlan = field(repr=False)
    offsets: dict[str, int] = field(repr=False)

    @property
    def operator(self) -> operators.Kronecker:
        """A ⊗ B on arrays (group, in, out)."""
        A = self.A if self.A.ndim == 3 else self.A.unsqueeze(0)
        return operators.Kronecker(A, self.B if self.B.ndim == 3 else self.B.unsqueeze(0))

    @property
    def sides(self) -> tuple[operators.Kronecker, operators.Kronecker]:
        """A ⊗ 1 and 1 ⊗ B: each factor by itself, with all of its groups."""
        whole = self.operator
        one = whole.B.new_ones(1, 1, 1)
        return operators.Kronecker(whole.A, one), operators.Kronecker(one, whole.B)


@dataclass(frozen=True)
class OfParameters(ABC):
    """What every block has: the parameters that it is of, and their curvature as an operator.

    Attributes:
        params: Names of the parameters, in the order of `dense`.
        shapes: Their shapes.
    """

    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    @abstractmethod
    def operator(self) -> Operator:
        """The block on vectors (numel,), the parameters' concatenated rvec as stored."""

    @property
    def A(self) -> Tensor:  # noqa: N802 - the factor's name
        """Input-based factor, with all scaling done. Raises `BlockError` where there is not one."""
        raise self._without_factors()

    @property
    def B(self) -> Tensor:  # noqa: N802 - the factor's name
        """Gradient-based factor, with all scaling done. Raises `BlockError`, too."""
        raise self._without_factors()

    def _without_factors(self) -> BlockError:
        return BlockError(
            f"the block of {', '.join(self.params)} is of kind {type(self).__name__}, which has no "
            "Kronecker factors; expected a Block. Its curvature is in `dense()` and `operator`."
        )

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(torch.Size(s).numel() for s in self.shapes)

    def dense(self) -> Float[Tensor, "numel numel"]:
        """The block as a matrix over the parameters' concatenated rvec, as stored."""
        return operators.to_dense(self.operator)

    def solve(
        self, vector: Float[Tensor, " numel"], damping: float, damp: str = "block"
    ) -> Float[Tensor, " numel"]:
        """(block + damping · I)⁻¹ vector, by eigenvalues; `damp` says what is damped instead.

        Args:
            vector: A vector, or a batch of them.
            damping: How much; see `fxkfac.operators.Damping`.
            damp: Of what; see there.

        Raises:
            OptionError: The damping is negative, or zero where the block is singular.
        """
        # The name comes with the error.
        named = BlockDiagonal((self.operator,), (", ".join(self.params),))
        return operators.solve(operators.damped(named, Damping(damping, damp)), vector)


@dataclass(frozen=True)
class Block(OfParameters):
    """The curvature of the parameters `params`: a sum of Kronecker products.

    Attributes:
        terms: The Kronecker products; one, unless a weight is used in different orientations or
            parts.
    """

    terms: tuple[Kronecker, ...]

    @property
    def A(self) -> Tensor:  # noqa: N802 - the factor's name
        """Input-based factor, with all scaling done; see `Kronecker.A`."""
        return self._single().A

    @property
    def B(self) -> Tensor:  # noqa: N802 - the factor's name
        """Gradient-based factor, with all scaling done; see `Kronecker.B`."""
        return self._single().B

    def _single(self) -> Kronecker:
        if len(self.terms) == 1:
            return self.terms[0]
        raise BlockError(
            f"the block of {', '.join(self.params)} is a sum of {len(self.terms)} Kronecker "
            "products, because the parameter is used in different orientations or parts; read "
            "A and B of each one in `block.terms`."
        )

    @property
    def operator(self) -> Operator:
        """The sum on vectors (numel,), the parameters' concatenated rvec as stored."""
        placed = [(term.operator, term.entries.to(term.B.device)) for term in self.terms]
        return laid_out(placed, self.numel)


@dataclass(frozen=True)
class Diagonal(OfParameters):
    """The exact diagonal of a block; or the identity, where that was asked for.

    Attributes:
        diagonal: R Σ_n Σ_c (∂ ⟨▲_{n,c}, f_n⟩ / ∂θ)², of the parameter's shape; or ones.
    """

    diagonal: Tensor

    @property
    def operator(self) -> operators.Diagonal:
        """The diagonal on vectors (numel,), the parameter's rvec as stored."""
        return operators.Diagonal(self.diagonal.flatten())


@dataclass(frozen=True)
class Dense(OfParameters):
    """One parameter's exact block.

    Attributes:
        matrix: R Σ_n Σ_c vec(G_{n,c}) vec(G_{n,c})ᵀ over the parameter's rvec, as stored.
    """

    matrix: Tensor

    @property
    def operator(self) -> operators.Dense:
        """The matrix on vectors (numel,), the parameter's rvec as stored."""
        return operators.Dense(self.matrix)
