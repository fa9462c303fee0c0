"""A₁ ⊗ B₁ + A₂ ⊗ B₂ in coordinates where it is diagonal.

Two pairs are diagonalised at once: UᵀA₁U = Λ and UᵀA₂U = I − Λ, VᵀB₁V = M and VᵀB₂V = I − M, with
entries from 0 to 1, for factors scaled to the same mean eigenvalue. In these coordinates the sum
has the entries λ_i μ_j + (1 − λ_i)(1 − μ_j), each term times its scale. They are as accurate as
A₁ + A₂ and B₁ + B₂ are well conditioned, which the four need not be; where one of these two is
singular, so is the whole. The coordinates are not orthogonal, so that they give the inverse and
the determinant, and no eigenvalues. They are found in float64 where the device has it: what is
small in one term is 1 − λ beside the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.linalg.operators.factored import Congruence, Factor, KroneckerSum
from fxkfac.linalg.operators.symmetric import require_finite, rounded, rounding, singular
from fxkfac.precision import widest

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Pencil:
    """(U ⊗ V)ᵀ C (U ⊗ V) = diag(values); `None` for a basis that is only scaled.

    Attributes:
        scale: What the columns of U ⊗ V are multiplied by.
        logdet: log det C.
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
    """The coordinates of a sum; `None` where it is singular, up to rounding.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    first, second = operator.first, operator.second
    if not operator.numel:
        return _of_nothing(operator)
    (A_least, B_least), (other_A, other_B) = first.least, second.least
    A = _pair(first.A, second.A, A_least, other_A)
    B = _pair(first.B, second.B, B_least, other_B)
    if A is None or B is None:
        return None
    least = widest(A_least) * widest(B_least) + widest(other_A) * widest(other_B)
    values = _values(A, B, least).expand(first.shape)
    if not bool((values > 0).all()):
        return None
    groups, d_in, d_out = first.shape
    logdet = values.log().sum() + (d_out * A.logdet + d_in * B.logdet).expand(groups).sum()
    scale = A.scale.unsqueeze(-1).expand(first.shape)
    assert B.basis is not None  # B is never a diagonal
    dtype = operator.dtype
    U = None if A.basis is None else A.basis.to(dtype)
    return Pencil(U, B.basis.to(dtype), scale.to(dtype), values.to(dtype), logdet.to(dtype))


def _of_nothing(operator: KroneckerSum) -> Pencil:
    """The coordinates of a sum without entries, which is regular."""
    like, (groups, d_in, d_out) = operator.like, operator.shape
    U, V = like.new_zeros(groups, d_in, d_in), like.new_zeros(groups, d_out, d_out)
    empty = like.new_zeros(operator.shape)
    return Pencil(U, V, empty, empty, like.new_zeros(()))


def regular_pencil(operator: KroneckerSum) -> Pencil:
    """The coordinates of a sum. Raises as `pencil`, and `OptionError` where it is singular."""
    found = pencil(operator)
    if found is None:
        raise singular()
    return found


@dataclass(frozen=True)
class _Pair:
    """UᵀaU = s diag(λ) and UᵀbU = t diag(1 − λ), for scales s, t and U = basis · diag(scale).

    Attributes:
        not_λ: 1 − λ.
        scales: s and t.
        logdet: log det (a / s + b / t).
        rounding: How far λ is off, at most.
    """

    λ: Float[Tensor, "group d"]
    not_λ: Float[Tensor, "group d"]
    basis: Float[Tensor, "group d d"] | None
    scale: Float[Tensor, "group d"]
    scales: tuple[Float[Tensor, " group"], Float[Tensor, " group"]]
    logdet: Float[Tensor, " group"]
    rounding: float

    @property
    def lengths(self) -> Float[Tensor, "group d"]:
        """uᵀu of all columns u of U."""
        squares = self.scale.square()
        return squares if self.basis is None else self.basis.square().sum(-2) * squares


def _values(A: _Pair, B: _Pair, least: Tensor) -> Tensor:
    """(u ⊗ v)ᵀ C (u ⊗ v) for all u and v; zero up to rounding is zero, or what was added there."""
    one, other = ((w * v).view(-1, 1, 1) for w, v in zip(A.scales, B.scales, strict=True))
    λ, not_λ = A.λ.unsqueeze(-1), A.not_λ.unsqueeze(-1)
    μ, not_μ = B.λ.unsqueeze(-2), B.not_λ.unsqueeze(-2)
    values = one * λ * μ + other * not_λ * not_μ
    lost = A.rounding * (one * μ + other * not_μ) + B.rounding * (one * λ + other * not_λ)
    added = least.view(-1, 1, 1) * A.lengths.unsqueeze(-1) * B.lengths.unsqueeze(-2)
    return torch.where(values > lost, values, 0.0).maximum(added)


def _pair(a: Tensor, b: Tensor, least_a: Tensor, least_b: Tensor) -> _Pair | None:
    """For symmetric a and b, or diagonals; `None` where their sum is singular."""
    require_finite(a, b)
    if a.ndim != b.ndim:  # no larger than the other
        a, b = (torch.diag_embed(t) if t.ndim == 2 else t for t in (a, b))
    a, s = _scaled(widest(a))
    b, t = _scaled(widest(b))
    if a.ndim == 2:
        σ = a + b
        if not bool((σ > 0).all()):
            return None
        return _Pair(a / σ, b / σ, None, σ.rsqrt(), (s, t), σ.log().sum(-1), 0.0)
    σ, P = torch.linalg.eigh(a + b)
    σ = rounded(σ, widest(least_a) / _or_one(s) + widest(least_b) / _or_one(t))
    if not bool((σ > 0).all()):
        return None
    W = P * σ.rsqrt().unsqueeze(-2)  # Wᵀ(a + b)W = I
    λ, Q = torch.linalg.eigh(W.mT @ a @ W)
    λ = λ.clamp(0, 1)
    return _Pair(λ, 1 - λ, W @ Q, torch.ones_like(λ), (s, t), σ.log().sum(-1), rounding(λ))


def _scaled(factor: Tensor) -> tuple[Tensor, Float[Tensor, " group"]]:
    """A factor of mean eigenvalue one, and its own mean; zero stays as it is."""
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1).clamp_min(0)
    return factor / _or_one(mean).view(-1, *[1] * (factor.ndim - 1)), mean


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
