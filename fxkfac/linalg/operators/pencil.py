"""A₁ ⊗ B₁ + A₂ ⊗ B₂ in coordinates where it is diagonal.

Two pairs are diagonalised at once: UᵀA₁U = Λ, UᵀA₂U = I and VᵀB₁V = M, VᵀB₂V = I. In these
coordinates the sum has the entries λ_i μ_j + 1. The coordinates are not orthogonal, so that they
give the inverse and the determinant, and no eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.operators.factored import Congruence, Factor, Kronecker, KroneckerSum
from fxkfac.linalg.operators.symmetric import is_regular, require_finite
from fxkfac.precision import accurate

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Pencil:
    """(U ⊗ V)ᵀ C (U ⊗ V) = diag(values); `None` for a basis that is only scaled.

    Attributes:
        scale: What the columns of U ⊗ V are multiplied by.
        logdet: log det of C.
    """

    U: Float[Tensor, "group d_in d_in"] | None
    V: Float[Tensor, "group d_out d_out"]
    scale: Float[Tensor, "group d_in d_out"]
    values: Float[Tensor, "group d_in d_out"]
    logdet: Tensor

    @property
    def inverse(self) -> Congruence:
        """C⁻¹."""
        return Congruence(self.U, self.V, self.scale.square() / self.values)

    @property
    def inverse_root(self) -> Factor:
        """F with F Fᵀ = C⁻¹."""
        return Factor(self.U, self.V, self.scale / self.values.sqrt())


def pencil(operator: KroneckerSum) -> Pencil | None:
    """The coordinates of a sum; `None` where both terms are singular, which says nothing of it.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    for one, other in (
        (operator.first, operator.second),
        (operator.second, operator.first),
    ):
        found = _pencil(one, other)
        if found is not None:
            return found
    return None


def _pencil(first: Kronecker, second: Kronecker) -> Pencil | None:
    A, B = _pair(first.A, second.A), _pair(first.B, second.B)
    if A is None or B is None:
        return None
    groups, d_in, d_out = first.shape
    values = (A.λ.unsqueeze(-1) * B.λ.unsqueeze(-2) + 1).expand(groups, d_in, d_out)
    logdet = values.log().sum() + (d_out * A.logdet + d_in * B.logdet).expand(groups).sum()
    scale = A.scale.unsqueeze(-1).expand(groups, d_in, d_out)
    assert B.basis is not None  # B is never a diagonal
    return Pencil(A.basis, B.basis, scale, values, logdet)


@dataclass(frozen=True)
class _Pair:
    """UᵀaU = diag(λ) and UᵀbU = I for U = basis · diag(scale), and log det b of every group."""

    λ: Float[Tensor, "group d"]
    basis: Float[Tensor, "group d d"] | None
    scale: Float[Tensor, "group d"]
    logdet: Float[Tensor, " group"]


def _pair(a: Tensor, b: Tensor) -> _Pair | None:
    """For symmetric a and positive definite b, or diagonals; `None` for a singular b."""
    require_finite(a, b)
    if a.ndim == b.ndim == 2:
        if not bool((b > 0).all()):
            return None
        return _Pair(a / b, None, b.rsqrt().expand_as(a / b), b.log().sum(-1))
    a, b = (torch.diag_embed(t) if t.ndim == 2 else t for t in (a, b))  # no larger than the other
    dtype, a, b = a.dtype, accurate(a), accurate(b)
    L, failed = torch.linalg.cholesky_ex(b)
    roots = L.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not is_regular(roots.square()):
        return None
    inner = torch.linalg.solve_triangular(L, a, upper=False)
    inner = torch.linalg.solve_triangular(L, inner.mT, upper=False)  # L⁻¹ a L⁻ᵀ
    λ, Q = torch.linalg.eigh((inner + inner.mT) / 2)
    U = torch.linalg.solve_triangular(L.mT, Q, upper=True)
    found = (λ.clamp_min(0), U, torch.ones_like(λ), 2 * roots.log().sum(-1))
    return _Pair(*(t.to(dtype) for t in found))
