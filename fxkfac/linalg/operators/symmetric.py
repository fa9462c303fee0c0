"""Eigenvalues of symmetric positive semi-definite tensors; zero up to rounding is zero.

Where damping was added, it is what is left there: eigenvalues are no smaller than `least`, which
holds where rounding beside the largest one does not let it be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.precision import accurate

if TYPE_CHECKING:
    from jaxtyping import Float

ROUNDING = 4  # times eps · √d: zero eigenvalues come out as large as that, beside a largest of one
# As far below zero an eigenvalue of a semi-definite matrix may come out, beside a largest of one:
# what was summed in float32 may be taken apart in float64.
NEGATIVE = torch.finfo(torch.float32).eps ** 0.5


def symmetric_eigh(
    matrix: Float[Tensor, "*group d d"], least: Float[Tensor, "*group"] | None = None
) -> tuple[Float[Tensor, "*group d"], Float[Tensor, "*group d d"]]:
    """Eigenvalues and eigenvectors, computed in float32 or better.

    Args:
        matrix: Semi-definite.
        least: What is known to be below all of its eigenvalues.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
        OptionError: An eigenvalue is negative beyond rounding.
    """
    require_finite(matrix)
    λ, Q = torch.linalg.eigh(accurate(matrix))
    return rounded(λ, least).to(matrix.dtype), Q.to(matrix.dtype)


def symmetric_eigenvalues(
    matrix: Float[Tensor, "*group d d"], least: Float[Tensor, "*group"] | None = None
) -> Float[Tensor, "*group d"]:
    """The eigenvalues alone; arguments and errors as above."""
    require_finite(matrix)
    return rounded(torch.linalg.eigvalsh(accurate(matrix)), least).to(matrix.dtype)


def factor_eigh(
    factor: Tensor, least: Float[Tensor, " group"] | None = None
) -> tuple[Float[Tensor, "group d"], Tensor | None]:
    """Eigenvalues and eigenvectors of a factor; of a diagonal, itself and `None`."""
    if factor.ndim == 3:
        return symmetric_eigh(factor, least)
    return require_semidefinite(factor), None


def factor_eigenvalues(
    factor: Tensor, least: Float[Tensor, " group"] | None = None
) -> Float[Tensor, "group d"]:
    """The eigenvalues of a factor, or the entries of a diagonal."""
    if factor.ndim == 3:
        return symmetric_eigenvalues(factor, least)
    return require_semidefinite(factor)


def rounded(
    λ: Float[Tensor, "*group d"], least: Float[Tensor, "*group"] | None
) -> Float[Tensor, "*group d"]:
    """Eigenvalues without what is rounding beside the largest one of their matrix.

    Raises as `symmetric_eigh`.
    """
    if not λ.numel():
        return λ
    largest = λ.amax(-1, keepdim=True).clamp_min(0)
    lowest = λ.amin(-1, keepdim=True)
    known = torch.zeros_like(lowest) if least is None else least.to(λ.dtype).unsqueeze(-1)
    lowest = lowest - known.clamp_min(0)  # without what damping has added
    if bool((lowest < -NEGATIVE * largest).any()):
        raise OptionError(
            f"the smallest eigenvalue is {lowest.min().item():.3g} beside "
            f"{largest.max().item():.3g}; expected a positive semi-definite matrix."
        )
    return torch.where(λ <= rounding(λ) * largest, 0.0, λ).maximum(known)


def rounded_squares(λ: Float[Tensor, "group d_in d_out"]) -> Float[Tensor, "group d_in d_out"]:
    """Eigenvalues that are sums of squares, as EKFAC's are, without what is rounding.

    It comes squared, too, beside the largest of the group.
    """
    if not λ.numel():
        return λ
    squared = (ROUNDING * torch.finfo(λ.dtype).eps) ** 2 * λ[0].numel()
    return torch.where(λ <= squared * λ.amax((1, 2), keepdim=True), 0.0, λ)


def rounding(λ: Float[Tensor, "*group d"]) -> float:
    """What eigenvalues may be off by, beside a largest one of one."""
    return ROUNDING * torch.finfo(λ.dtype).eps * λ.shape[-1] ** 0.5


def require_semidefinite(λ: Tensor) -> Tensor:
    """The same eigenvalues. Raises `NonFiniteError`, and `OptionError` where one is negative."""
    require_finite(λ)
    if λ.numel() and bool((λ < 0).any()):
        raise OptionError(
            f"an eigenvalue is {λ.min().item():.3g}; expected zero or a positive number."
        )
    return λ


def require_finite(*tensors: Tensor) -> None:
    """Raise `NonFiniteError` unless all numbers are finite."""
    for t in tensors:
        if not bool(t.isfinite().all()):
            raise NonFiniteError(
                f"a factor of shape {tuple(t.shape)} holds NaN or Inf; expected finite numbers. "
                "Leave out the batch that it comes from."
            )


def singular() -> OptionError:
    """The error of an operator that has no inverse."""
    return OptionError(
        "the operator is singular: its smallest eigenvalue is zero up to rounding; expected a "
        "regular one, or damping > 0. Pass a positive damping."
    )
