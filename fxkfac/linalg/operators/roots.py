"""Square roots F of an operator, F Fᵀ = C, and Gaussian samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Diagonal, Placed
from fxkfac.linalg.operators.factored import Factor, Kronecker, KroneckerSum
from fxkfac.linalg.operators.functions import power
from fxkfac.linalg.operators.least import least
from fxkfac.linalg.operators.named import Named, public
from fxkfac.linalg.operators.pencil import regular_pencil
from fxkfac.linalg.operators.products import product
from fxkfac.linalg.operators.spectra import each_block, in_place, unflattened, written_out
from fxkfac.linalg.operators.symmetric import require_semidefinite, symmetric_eigenvalues
from fxkfac.precision import accurate
from fxkfac.ranges import require_count, require_generator


@public
def cholesky(operator: Operator) -> Operator:
    """The lower triangular L with L Lᵀ = C; that of a Kronecker product is L_A ⊗ L_B.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The operator is singular, up to rounding, or not positive semi-definite; or a
            sum that is too large to be written out.
    """
    match operator:
        case Kronecker():
            scale = operator.like.new_ones(()).expand(operator.shape)
            if operator.A.ndim == 2:
                scale = scale * _roots(operator.A).unsqueeze(-1)
            A_least, B_least = operator.least
            U = None if operator.A.ndim == 2 else _cholesky(operator.A, A_least)
            return Factor(U, _cholesky(operator.B, B_least), scale)
        case Diagonal():
            return Diagonal(_roots(operator.values))
        case BlockDiagonal():
            return each_block(cholesky, operator)
        case _:
            L = _cholesky(written_out(operator), least(operator))
            return unflattened(Factor(L.unsqueeze(0), None, L.new_ones(1, len(L), 1)), operator)


def _cholesky(matrix: Tensor, least: Tensor) -> Tensor:
    # Pivots may be well above the smallest eigenvalue, so that they do not say what is singular.
    C = accurate(matrix)
    regular = bool((symmetric_eigenvalues(C, least) > 0).all())
    L, failed = torch.linalg.cholesky_ex(C)
    if not regular or bool(failed.any()):
        raise _singular()
    return L.to(matrix.dtype)


def _roots(values: Tensor) -> Tensor:
    if not bool((require_semidefinite(values) > 0).all()):
        raise _singular()
    return values.sqrt()


def _singular() -> OptionError:
    return OptionError(
        "the operator is singular and has no Cholesky factor; expected a regular one. Pass a "
        "positive damping, or take `power(operator, 0.5)`, which is a root as well."
    )


@public
def inverse_root(operator: Operator) -> Operator:
    """F with F Fᵀ = C⁻¹: C^(−1/2), which is symmetric, but for a sum of two Kronecker products.

    Raises as `power`.
    """
    match operator:
        case BlockDiagonal():
            return each_block(inverse_root, operator)
        case Placed() if not operator.repeats:
            return in_place(inverse_root, operator)
        case KroneckerSum():
            return regular_pencil(operator).inverse_root
        case _:
            return power(operator, -0.5)


def sample(
    operator: Operator, number: int, generator: torch.Generator
) -> Tensor | dict[str, Tensor]:
    """Draws from N(0, C⁻¹), of shape (number, *shape); or by name.

    Args:
        operator: C, the inverse of the covariance.
        number: How many.
        generator: What they are drawn from, on the operator's device.

    Raises as `power`, and `OptionError` unless the number is one.
    """
    number = require_count("number", number, "whole number of draws", least=0)
    require_generator(generator)
    noise = torch.randn(
        number, *operator.shape, dtype=operator.dtype, device=operator.device, generator=generator
    )
    found = product(inverse_root(operator), noise)
    return operator.split(found) if isinstance(operator, Named) else found
