"""Functions of an operator by its eigenvalues: powers, solutions, determinants, condition."""

from __future__ import annotations

import torch
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Placed
from fxkfac.linalg.operators.factored import Eigenbasis, Kronecker, KroneckerSum
from fxkfac.linalg.operators.named import public
from fxkfac.linalg.operators.pencil import pencil, regular_pencil
from fxkfac.linalg.operators.products import Array, product
from fxkfac.linalg.operators.spectra import (
    each_block,
    eigenvalues,
    factors_eigenvalues,
    factors_eigh,
    in_place,
    mapped,
    of_blocks,
)
from fxkfac.linalg.operators.symmetric import singular
from fxkfac.precision import widest
from fxkfac.ranges import number_in, require_number


@public
def power(operator: Operator, exponent: float) -> Operator:
    """C^p = Q Λ^p Qᵀ, for any real p; C⁰ = I.

    A sum of two Kronecker products is inverted without being written out.

    Args:
        operator: C.
        exponent: p.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The exponent is no number, or negative and the operator singular, up to
            rounding; a power is too large for the dtype; or what `diagonalised` raises.
    """
    require_number("exponent", number_in(exponent))
    match operator:
        case BlockDiagonal():
            return each_block(lambda block: power(block, exponent), operator)
        case Placed() if not operator.repeats:
            return in_place(lambda placed: power(placed, exponent), operator)
        case KroneckerSum() if exponent == -1:
            return regular_pencil(operator).inverse
        case Kronecker():  # of which the dtype may have room for powers, and none for products
            (λ, Q_A), (μ, Q_B) = factors_eigh(operator)
            powers = _powers(widest(λ).unsqueeze(-1) * widest(μ).unsqueeze(-2), exponent)
            return Eigenbasis(Q_A, Q_B, _require_room(powers.to(operator.dtype)))
        case _:
            return mapped(lambda λ: _require_room(_powers(λ, exponent)), operator)


def _powers(λ: Tensor, exponent: float) -> Tensor:
    if exponent < 0 and bool((λ == 0).any()):
        raise singular()
    return λ**exponent


def _require_room(powers: Tensor) -> Tensor:
    """The same. Raises `OptionError` where one is too large for its dtype."""
    if not bool(powers.isfinite().all()):
        raise OptionError(
            f"a power of an eigenvalue is larger than {powers.dtype} holds; expected numbers that "
            "fit. Take it of to_dtype(operator, torch.float64), or damp the operator."
        )
    return powers


def solve(operator: Operator, x: Array) -> Array:
    """C⁻¹ x, for one array (*shape) or a batch of them (*batch, *shape); or for tensors by name.

    For several of them one after the other, `power(operator, -1)` is computed once.

    Raises:
        UnknownParameter, ParameterError: As `product`.
        OptionError, NonFiniteError: As `power`.
    """
    return product(power(operator, -1), x)


@public
def logdet(operator: Operator) -> Tensor:
    """log det C, a tensor of no axes; −∞ where it is singular, up to rounding.

    Raises as `diagonalised` does.
    """
    match operator:
        case BlockDiagonal():
            return torch.stack(of_blocks(logdet, operator)).sum()
        case Placed() if operator.is_permutation:
            return logdet(operator.operator)
        case KroneckerSum():
            found = pencil(operator)
            return operator.like.new_tensor(-torch.inf) if found is None else found.logdet
        case Kronecker():
            return _logs(operator).sum().to(operator.dtype)
        case _:
            return eigenvalues(operator).log().sum()


@public
def det(operator: Operator) -> Tensor:
    """det C, a tensor of no axes.

    Raises as `diagonalised` does.
    """
    return logdet(operator).exp()


@public
def condition(operator: Operator) -> Tensor:
    """The largest eigenvalue over the smallest; ∞ where it is singular, up to rounding.

    Raises:
        OptionError: It has no rows; or what `diagonalised` raises.
    """
    if not operator.numel:
        raise OptionError("the operator has no rows, and so no condition number; expected some.")
    if isinstance(operator, Kronecker):
        logs = _logs(operator)
        smallest = logs.min()
        found = torch.where(smallest > -torch.inf, (logs.max() - smallest).exp(), torch.inf)
        return found.to(operator.dtype)
    λ = eigenvalues(operator)
    smallest = λ.min()
    return torch.where(smallest > 0, λ.max() / smallest, torch.inf)  # also where all are zero


def _logs(operator: Kronecker) -> Tensor:
    """Those of all eigenvalues, of which the products may be too small or too large."""
    λ, μ = map(widest, factors_eigenvalues(operator))
    return (λ.log().unsqueeze(-1) + μ.log().unsqueeze(-2)).expand(operator.shape)
