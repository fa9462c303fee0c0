"""Square roots of the Hessian of a criterion, by autodiff, row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.errors import LossError, NonFiniteError
from fxkfac.isolation import missing_derivatives

if TYPE_CHECKING:
    from jaxtyping import Float

REMEDY = "Use fisher='mc' or 'empirical', or define `hessian_sqrt`."


def row_roots(
    name: str, criterion: Callable[[Tensor], Tensor], f: Float[Tensor, " N *F"]
) -> Float[Tensor, "N dim_F dim_F"]:
    """The symmetric square root √H of the Hessian of each row of axis 0.

    Args:
        name: Of the likelihood, for errors.
        criterion: Σ_n c(f_n), in which rows are independent.
        f: The prediction.

    Raises:
        LossError: The criterion is not convex in f, so that no real square root exists, or PyTorch
            cannot differentiate it twice.
        NonFiniteError: A Hessian is not finite.
    """
    H = _row_hessians(name, criterion, f)
    if not H.isfinite().all():
        raise NonFiniteError(
            f"the Hessian of {name} holds NaN or Inf. Look for infinite predictions, or for an "
            "`nll` whose second derivative does not exist there."
        )
    eigenvalues, Q = torch.linalg.eigh(H)
    _require_convex(name, eigenvalues)
    return (Q * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)) @ Q.mT  # Q √Λ Qᵀ


def _row_hessians(name: str, criterion: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """Definition 9, for every row."""
    pullback = torch.func.vjp(torch.func.grad(criterion), f)[1]
    rows = f.reshape(len(f), -1)
    # Rows are independent, so that one product serves column d of every row's Hessian.
    columns = []
    for d in range(rows.shape[1]):
        e = torch.zeros_like(rows)
        e[:, d] = 1
        with missing_derivatives(partial(_without_derivative, name)):
            columns.append(pullback(e.reshape(f.shape))[0].reshape(rows.shape))
    H = torch.stack(columns, dim=2)
    return (H + H.mT) / 2


def _without_derivative(name: str, message: str) -> LossError:
    return LossError(
        f"the criterion of {name} has no second derivative in PyTorch: {message}. {REMEDY}"
    )


def _require_convex(name: str, eigenvalues: Tensor) -> None:
    eps = torch.finfo(eigenvalues.dtype).eps
    # A saturated row's Hessian is rounding alone: measure by the largest one, not by its own.
    rounding = eps**0.5 * eigenvalues.abs().max() + eps
    if eigenvalues.min() < -rounding:
        row = int(eigenvalues.amin(1).argmin())
        raise LossError(
            f"{name} is not convex in the prediction: its Hessian at row {row} has the eigenvalue "
            f"{eigenvalues.min().item():.3g}, so it has no real square root. {REMEDY}"
        )
