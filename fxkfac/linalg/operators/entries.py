"""What is read off an operator's entries: its matrix, diagonal, trace and Frobenius products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.errors import ParameterError
from fxkfac.linalg.kronecker import kronecker_dense
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Dense, Diagonal, Placed, Sum
from fxkfac.linalg.operators.factored import Congruence, Eigenbasis, Kronecker, KroneckerSum
from fxkfac.linalg.operators.named import Named, public
from fxkfac.linalg.operators.products import apply, gathered, transpose, unrotated
from fxkfac.precision import widest

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST_DENSE = 2**28  # numbers in a matrix that is written out unasked: 1 GiB in float32
CHUNK = 2**22  # numbers of unit vectors that are made at once


def units(operator: Operator) -> Iterator[Tensor]:
    """Unit vectors e_k as arrays (some, *shape) that the operator acts on, some at a time."""
    n = operator.numel
    some = max(1, CHUNK // max(n, 1))
    for start in range(0, n, some):
        rows = torch.arange(start, min(start + some, n), device=operator.device)
        ones = operator.like.new_ones(len(rows), 1)
        zeros = operator.like.new_zeros(len(rows), n)
        yield zeros.scatter(1, rows.unsqueeze(1), ones).unflatten(-1, operator.shape)


@public
@singledispatch
def to_dense(operator: Operator) -> Float[Tensor, "numel numel"]:
    """The matrix, (numel, numel), over the rvec of the arrays that it acts on."""
    rows = [apply(transpose(operator), e).flatten(1) for e in units(operator)]
    return torch.cat(rows) if rows else operator.like.new_zeros(0, 0)


@to_dense.register
def _(operator: Kronecker) -> Tensor:
    A = torch.diag_embed(operator.A) if operator.A.ndim == 2 else operator.A
    g = operator.shape[0]
    blocks = kronecker_dense(A.expand(g, -1, -1), operator.B.expand(g, -1, -1))
    return blocks[0] if g == 1 else torch.block_diag(operator.B.new_zeros(0, 0), *blocks)


@to_dense.register
def _(operator: KroneckerSum) -> Tensor:
    return to_dense(operator.first) + to_dense(operator.second)


@to_dense.register
def _(operator: Diagonal) -> Tensor:
    return torch.diag(operator.values.flatten())


@to_dense.register
def _(operator: Dense) -> Tensor:
    return operator.matrix


@to_dense.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.block_diag(*(to_dense(block) for block in operator.blocks))


@to_dense.register
def _(operator: Placed) -> Tensor:
    total = operator.like.new_zeros(operator.numel, operator.numel)
    e, matrix = operator.entries.flatten(), to_dense(operator.operator)
    return total.index_put((e[:, None], e[None, :]), matrix, accumulate=True)


@to_dense.register
def _(operator: Sum) -> Tensor:
    return torch.stack([to_dense(term) for term in operator.terms]).sum(0)


def diagonal(operator: Operator) -> Tensor | dict[str, Tensor]:
    """The entries of the diagonal, as an array (*shape) that the operator acts on; or by name.

    Read off the factors; of a sum of overlapping parts by one product with every unit vector.
    """
    found = diagonal_of(operator)
    return operator.split(found) if isinstance(operator, Named) else found


@public
@singledispatch
def diagonal_of(operator: Operator) -> Tensor:
    """`diagonal` as one array, also over names."""
    return _diagonal_by_products(operator)


def _diagonal_by_products(operator: Operator) -> Tensor:
    parts = [(apply(operator, e) * e).flatten(1).sum(1) for e in units(operator)]
    flat = torch.cat(parts) if parts else operator.like.new_zeros(0)
    return flat.view(operator.shape)


@diagonal_of.register
def _(operator: Kronecker) -> Tensor:
    A = operator.A if operator.A.ndim == 2 else operator.A.diagonal(dim1=-2, dim2=-1)
    B = operator.B.diagonal(dim1=-2, dim2=-1)
    return A.unsqueeze(-1) * B.unsqueeze(-2)


@diagonal_of.register
def _(operator: Eigenbasis) -> Tensor:
    return _squares(operator.Q_A, operator.Q_B, operator.eigenvalues)


@diagonal_of.register
def _(operator: Congruence) -> Tensor:
    return _squares(operator.U, operator.V, operator.values)


def _squares(U: Tensor | None, V: Tensor | None, values: Tensor) -> Tensor:
    """Σ_k F_ik² λ_k for F = U ⊗ V, whose squares are the product of the squares."""
    squared = [None if t is None else t.square() for t in (U, V)]
    return unrotated(squared[0], squared[1], values)


@diagonal_of.register
def _(operator: KroneckerSum) -> Tensor:
    return diagonal_of(operator.first) + diagonal_of(operator.second)


@diagonal_of.register
def _(operator: Diagonal) -> Tensor:
    return operator.values


@diagonal_of.register
def _(operator: Dense) -> Tensor:
    return operator.matrix.diagonal()


@diagonal_of.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.cat([diagonal_of(block).flatten() for block in operator.blocks])


@diagonal_of.register
def _(operator: Placed) -> Tensor:
    if operator.repeats:  # entries beside the diagonal of C count, too
        return _diagonal_by_products(operator)
    return gathered(operator, diagonal_of(operator.operator))


@diagonal_of.register
def _(operator: Sum) -> Tensor:
    return torch.stack([diagonal_of(term) for term in operator.terms]).sum(0)


@public
def trace(operator: Operator) -> Tensor:
    """The sum of the diagonal, which is that of the eigenvalues; a tensor of no axes."""
    return diagonal_of(operator).sum()


@public
def inner(one: Operator, other: Operator) -> Tensor:
    """The Frobenius inner product tr(C D) of two operators on the same arrays, of no axes.

    By the factors of Kronecker products and the entries of diagonals and matrices; of others by
    one product of each with every unit vector, some at a time.

    Raises:
        ParameterError: They act on arrays of different shapes.
    """
    if one.shape != other.shape:
        raise ParameterError(
            f"one operator acts on arrays {tuple(one.shape)}, the other on {tuple(other.shape)}; "
            "expected one shape."
        )
    return _inner(one, other).to(one.dtype)


def _inner(one: Operator, other: Operator) -> Tensor:
    """The same, in a dtype that has room for squares of entries."""
    match one, other:
        case (Sum() | KroneckerSum(), _):
            return torch.stack([_inner(term, other) for term in terms_of(one)]).sum()
        case (_, Sum() | KroneckerSum()):
            return _inner(other, one)
        case (Diagonal(), _):
            return _product(one.values, diagonal_of(other)).sum()
        case (_, Diagonal()):
            return _inner(other, one)
        case (Kronecker(), Kronecker()):
            return (_of_factors(one.A, other.A) * _of_factors(one.B, other.B)).sum()
        case (Eigenbasis(), Eigenbasis()) if one.Q_A is other.Q_A and one.Q_B is other.Q_B:
            return _product(one.eigenvalues, other.eigenvalues).sum()
        case (Dense(), Dense()):
            return _product(one.matrix, other.matrix).sum()
        case (BlockDiagonal(), BlockDiagonal()) if _shapes(one) == _shapes(other):
            pairs = zip(one.blocks, other.blocks, strict=True)
            return torch.stack([_inner(a, b) for a, b in pairs]).sum()
        case (Placed(), Placed()) if not one.repeats and one.entries.equal(other.entries):
            return _inner(one.operator, other.operator)
        case _:
            parts = [_product(apply(one, e), apply(other, e)).sum() for e in units(one)]
            return torch.stack([widest(one.like).new_zeros(()), *parts]).sum()


@public
def norm(operator: Operator) -> Tensor:
    """The Frobenius norm √Σ C_ij², a tensor of no axes, by `inner`."""
    return _inner(operator, operator).sqrt().to(operator.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return widest(a) * widest(b)


def terms_of(operator: Operator) -> tuple[Operator, ...]:
    """The terms of a sum; of anything else, itself."""
    match operator:
        case Sum():
            return operator.terms
        case KroneckerSum():
            return operator.first, operator.second
        case _:
            return (operator,)


def _of_factors(a: Tensor, b: Tensor) -> Float[Tensor, " group"]:
    """tr(a b) for every group, of matrices or diagonals."""
    if a.ndim != b.ndim:
        a, b = (t if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1) for t in (a, b))
    return _product(a, b).flatten(1).sum(1)


def _shapes(operator: BlockDiagonal) -> list[torch.Size]:
    return [block.shape for block in operator.blocks]
