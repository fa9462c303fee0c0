"""An operator -> the same operator with its eigenvalues at hand, C = Q Λ Qᵀ.

It is an `Eigenbasis`, a `Diagonal`, or put together of such by `BlockDiagonal` and `Placed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fxkfac.errors import FxkfacError, OptionError
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Dense, Diagonal, Placed, Sum, identity
from fxkfac.linalg.operators.entries import LARGEST_DENSE, to_dense
from fxkfac.linalg.operators.factored import Eigenbasis, Factor, Kronecker
from fxkfac.linalg.operators.least import least
from fxkfac.linalg.operators.named import public
from fxkfac.linalg.operators.products import gathered
from fxkfac.linalg.operators.symmetric import (
    factor_eigenvalues,
    factor_eigh,
    require_semidefinite,
    symmetric_eigenvalues,
    symmetric_eigh,
)

if TYPE_CHECKING:
    from jaxtyping import Float

T = TypeVar("T")


@public
@singledispatch
def diagonalised(operator: Operator) -> Operator:
    """The same operator with its eigenvalues at hand, so that further functions cost little.

    Sums of Kronecker products are written out for it.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: An eigenvalue is negative beyond rounding, the operator is a `Factor` and not
            symmetric, or it is too large to be written out.
    """
    return _by_its_matrix(operator)


def _by_its_matrix(operator: Operator) -> Placed:
    λ, Q = symmetric_eigh(written_out(operator), least(operator))
    return unflattened(Eigenbasis(Q.unsqueeze(0), None, λ.view(1, -1, 1)), operator)


@diagonalised.register
def _(operator: Kronecker) -> Operator:
    (λ, Q_A), (μ, Q_B) = factors_eigh(operator)
    return Eigenbasis(Q_A, Q_B, λ.unsqueeze(-1) * μ.unsqueeze(-2))


def factors_eigh(operator: Kronecker) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Eigenvalues and eigenvectors of A, and those of B."""
    A_least, B_least = operator.least
    return factor_eigh(operator.A, A_least), factor_eigh(operator.B, B_least)


@diagonalised.register
def _(operator: Eigenbasis) -> Operator:
    require_semidefinite(operator.eigenvalues)
    return operator


@diagonalised.register
def _(operator: Diagonal) -> Operator:
    require_semidefinite(operator.values)
    return operator


@diagonalised.register
def _(operator: BlockDiagonal) -> Operator:
    return each_block(diagonalised, operator)


@diagonalised.register
def _(operator: Placed) -> Operator:
    return _by_its_matrix(operator) if operator.repeats else in_place(diagonalised, operator)


@public
@singledispatch
def eigenvalues(operator: Operator) -> Float[Tensor, " numel"]:
    """All eigenvalues, in the order of the columns of the eigenvectors that `eigh` gives.

    Raises as `diagonalised` does.
    """
    return symmetric_eigenvalues(written_out(operator), least(operator))


@eigenvalues.register
def _(operator: Kronecker) -> Tensor:
    λ, μ = factors_eigenvalues(operator)
    return (λ.unsqueeze(-1) * μ.unsqueeze(-2)).flatten()


def factors_eigenvalues(operator: Kronecker) -> tuple[Tensor, Tensor]:
    """Those of A and those of B."""
    A_least, B_least = operator.least
    return factor_eigenvalues(operator.A, A_least), factor_eigenvalues(operator.B, B_least)


@eigenvalues.register
def _(operator: Eigenbasis) -> Tensor:
    return require_semidefinite(operator.eigenvalues).flatten()


@eigenvalues.register
def _(operator: Diagonal) -> Tensor:
    return require_semidefinite(operator.values).flatten()


@eigenvalues.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.cat(of_blocks(eigenvalues, operator))


@eigenvalues.register
def _(operator: Placed) -> Tensor:
    if operator.repeats:
        return symmetric_eigenvalues(written_out(operator), least(operator))
    found = eigenvalues(operator.operator).view(operator.entries.shape)
    return gathered(operator, found).flatten()


def eigh(operator: Operator) -> tuple[Float[Tensor, " numel"], Operator]:
    """Eigenvalues and orthogonal Q with C = Q diag(eigenvalues) Qᵀ; `to_dense(Q)` writes it out.

    Raises as `diagonalised` does.
    """
    spectrum = diagonalised(operator)
    return eigenvalues(spectrum), _eigenvectors(spectrum)


@public
def _eigenvectors(spectrum: Operator) -> Operator:
    match spectrum:
        case Eigenbasis():
            ones = spectrum.like.new_ones(()).expand(spectrum.shape)
            return Factor(spectrum.Q_A, spectrum.Q_B, ones)
        case BlockDiagonal():
            return replace(spectrum, blocks=tuple(map(_eigenvectors, spectrum.blocks)))
        case Placed():
            return replace(spectrum, operator=_eigenvectors(spectrum.operator))
        case _:
            return identity(spectrum.shape, spectrum.like)


def mapped(function: Callable[[Tensor], Tensor], operator: Operator) -> Operator:
    """Q f(Λ) Qᵀ; the function is of eigenvalues, entry by entry."""
    match operator:
        case Eigenbasis():
            return replace(
                operator, eigenvalues=function(require_semidefinite(operator.eigenvalues))
            )
        case Diagonal():
            return Diagonal(function(require_semidefinite(operator.values)))
        case BlockDiagonal():
            return each_block(lambda block: mapped(function, block), operator)
        case Placed() if not operator.repeats:
            return in_place(lambda placed: mapped(function, placed), operator)
        case _:
            return mapped(function, diagonalised(operator))


def written_out(operator: Operator) -> Float[Tensor, "numel numel"]:
    """The matrix of a symmetric operator.

    Raises `OptionError` where it is too large for that, or where a `Factor` is in it.
    """
    if _has_factor(operator):
        raise OptionError(
            f"{type(operator).__name__} is not symmetric, as a Cholesky factor or eigenvectors are "
            "not; expected a symmetric operator for what goes by eigenvalues. Take this of the "
            "operator that it is a factor of, or of to_dense(operator) by torch.linalg."
        )
    if operator.numel**2 > LARGEST_DENSE and not isinstance(operator, Dense):
        raise OptionError(
            f"{type(operator).__name__} has no eigenvalues but those of its matrix of "
            f"{operator.numel**2:,} numbers; expected at most {LARGEST_DENSE:,}. Use what needs "
            "products alone, or damp the factors, where it is a sum of two that lie alike; where "
            "one of them alone has a bias, they do so by separate_weight_and_bias=True."
        )
    return to_dense(operator)


def _has_factor(operator: Operator) -> bool:
    match operator:
        case Placed():
            return _has_factor(operator.operator)
        case Sum():
            return any(map(_has_factor, operator.terms))
        case BlockDiagonal():
            return any(map(_has_factor, operator.blocks))
        case _:
            return isinstance(operator, Factor)


def unflattened(operator: Operator, like: Operator) -> Placed:
    """An operator on as many entries, on arrays of the shape that another one acts on."""
    entries = torch.arange(operator.numel, device=operator.device).view(operator.shape)
    return Placed(operator, entries, like.shape)


def each_block(function: Callable[[Operator], Operator], operator: BlockDiagonal) -> BlockDiagonal:
    """A function of every block."""
    return BlockDiagonal(tuple(of_blocks(function, operator)), operator.names)


def of_blocks(function: Callable[[Operator], T], operator: BlockDiagonal) -> list[T]:
    """What a function gives for every block; where it fails, the block is named."""
    found = []
    for k, block in enumerate(operator.blocks):
        try:
            found.append(function(block))
        except FxkfacError as error:
            if not operator.names:
                raise
            raise type(error)(f"the block of {operator.names[k]}: {error}") from error
    return found


def in_place(function: Callable[[Operator], Operator], operator: Placed) -> Placed:
    """A function of a placed operator, in the same place."""
    operator = completed(operator)
    return replace(operator, operator=function(operator.operator))


def completed(operator: Placed) -> Placed:
    """The same operator with zeros where nothing lies, as a permutation."""
    if operator.is_permutation:
        return operator
    rest = (operator.counts == 0).nonzero().flatten()
    zeros = identity((len(rest),), operator.like, 0.0)
    entries = torch.cat([operator.entries.flatten(), rest])
    return Placed(BlockDiagonal((operator.operator, zeros)), entries, operator.into)
