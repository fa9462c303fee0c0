"""Kronecker products of two symmetric factors, one for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.errors import OptionError

if TYPE_CHECKING:
    from jaxtyping import Float


def kronecker_dense(
    A: Float[Tensor, "group d_in d_in"], B: Float[Tensor, "group d_out d_out"]
) -> Float[Tensor, "group d_in_d_out d_in_d_out"]:
    """A ⊗ B for every group: the matrix that acts on the rvec of an (in, out) matrix."""
    product = torch.einsum("g i j, g o p -> g i o j p", A, B)
    return product.flatten(3, 4).flatten(1, 2)


def require_positive(damping: float) -> None:
    """Raise `OptionError` unless the damping is positive."""
    if not damping > 0:
        raise OptionError(f"damping={damping}; expected a positive number to damp factors with.")


def require_regular(eigenvalues: Tensor, damping: float) -> None:
    """Raise `OptionError` for negative damping, and for a singular matrix without any."""
    if damping < 0:
        raise OptionError(f"damping={damping}; expected zero or a positive number.")
    rounding = torch.finfo(eigenvalues.dtype).eps * eigenvalues.numel()
    if damping == 0 and bool((eigenvalues <= rounding * eigenvalues.max()).any()):
        raise OptionError(
            "the block is singular: its smallest eigenvalue is zero up to rounding; expected a "
            "regular one, or damping > 0. Pass a positive damping."
        )


def kronecker_solve(
    A: Float[Tensor, "group d_in d_in"],
    B: Float[Tensor, "group d_out d_out"],
    G: Float[Tensor, "group d_in d_out"],
    damping: float,
) -> Float[Tensor, "group d_in d_out"]:
    """Solve (A ⊗ B + damping · I) vec X = vec G exactly, by the eigenvalues of both factors.

    With A = Q_A Λ_A Q_Aᵀ and B = Q_B Λ_B Q_Bᵀ the eigenvalues of A ⊗ B are the products.

    Raises:
        OptionError: The damping is negative, or zero where the product is singular.
    """
    (lambda_A, Q_A), (lambda_B, Q_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    # Positive semi-definite by construction: what is below zero is rounding.
    eigenvalues = lambda_A.clamp_min(0).unsqueeze(-1) * lambda_B.clamp_min(0).unsqueeze(-2)
    require_regular(eigenvalues, damping)
    rotated = Q_A.mT @ G @ Q_B
    return Q_A @ (rotated / (eigenvalues + damping)) @ Q_B.mT


def damped(factor: Float[Tensor, "group d d"], damping: float) -> Float[Tensor, "group d d"]:
    """factor + √damping · I: the damping of one of the two factors of a product."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + damping**0.5 * identity


def kronecker_sum_solve(
    first: tuple[Float[Tensor, "group d_in d_in"], Float[Tensor, "group d_out d_out"]],
    second: tuple[Float[Tensor, "group d_in d_in"], Float[Tensor, "group d_out d_out"]],
    G: Float[Tensor, "group d_in d_out"],
) -> Float[Tensor, "group d_in d_out"]:
    """Solve (A₁ ⊗ B₁ + A₂ ⊗ B₂) vec X = vec G exactly; both factors of `second` are regular.

    Two pairs are diagonalised at once: UᵀA₁U = Λ, UᵀA₂U = I and VᵀB₁V = M, VᵀB₂V = I. In these
    coordinates the sum is the diagonal matrix with entries λ_i μ_j + 1.
    """
    (λ, U), (μ, V) = (diagonalise(a, b) for a, b in zip(first, second, strict=True))
    scaled = (U.mT @ G @ V) / (λ.unsqueeze(-1) * μ.unsqueeze(-2) + 1)
    return U @ scaled @ V.mT


def diagonalise(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """λ and U with Uᵀ a U = diag λ and Uᵀ b U = I, for symmetric a and positive definite b."""
    L, failed = torch.linalg.cholesky_ex(b)
    if bool(failed.any()):
        raise OptionError(
            "a factor of the sum is singular; expected a regular one, or damping > 0. Pass a "
            "larger damping."
        )
    inner = torch.linalg.solve_triangular(L, a, upper=False)
    inner = torch.linalg.solve_triangular(L, inner.mT, upper=False)  # L⁻¹ a L⁻ᵀ
    eigenvalues, Q = torch.linalg.eigh((inner + inner.mT) / 2)
    return eigenvalues.clamp_min(0), torch.linalg.solve_triangular(L.mT, Q, upper=True)
