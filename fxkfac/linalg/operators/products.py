"""What an operator does to arrays, and what is read off its entries: no eigenvalue is needed."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fxkfac.errors import OptionError, ParameterError
from fxkfac.linalg.operators.base import Operator, require_operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Dense, Diagonal, Placed, Sum
from fxkfac.linalg.operators.factored import (
    Congruence,
    Eigenbasis,
    Factor,
    Kronecker,
    KroneckerSum,
)
from fxkfac.linalg.operators.named import Named, own_dtype, public

Array = TypeVar("Array", Tensor, dict[str, Tensor])


def product(operator: Operator, x: Array) -> Array:
    """C x, for one array (*shape) or a batch of them (*batch, *shape).

    For an operator over names these are tensors by name.

    The columns of a matrix are a batch after a transposition: `product(C, M.mT).mT`.

    Raises:
        ParameterError: The array has another shape or dtype than the operator, or a tensor by name
            another shape, or no floating dtype.
        UnknownParameter: A name is missing, or is not among the operator's.
    """
    require_operator(operator)
    with own_dtype(operator):
        if not isinstance(x, Tensor):
            return _by_name(operator, x)
        _require_fit(operator, x)
        return apply(operator, x)


def _by_name(operator: Operator, x: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(operator, Named):
        raise ParameterError(
            f"{type(operator).__name__} acts on arrays; found a {type(x).__name__}. Pass a tensor."
        )
    found = operator.split(apply(operator.operator, operator.joined(x)))
    return {name: found[name].to(t.dtype) for name, t in x.items()}


def _require_fit(operator: Operator, x: Tensor) -> None:
    shape = operator.shape
    if x.shape[x.ndim - len(shape) :] != shape or x.dtype != operator.dtype:
        raise ParameterError(
            f"the array has shape {tuple(x.shape)} and dtype {x.dtype}; expected "
            f"(..., {', '.join(map(str, shape))}) and {operator.dtype}, as the operator has."
        )


def apply(operator: Operator, x: Tensor) -> Tensor:
    """`product` of an array, without its checks."""
    match operator:
        case Kronecker():
            return left(operator.A, x @ operator.B)  # A X B, and B = Bᵀ
        case Eigenbasis():
            return sandwich(operator.Q_A, operator.Q_B, operator.eigenvalues, x)
        case Congruence():
            return sandwich(operator.U, operator.V, operator.values, x)
        case Factor() if operator.transposed:
            return operator.scale * rotated(operator.U, operator.V, x)
        case Factor():
            return unrotated(operator.U, operator.V, operator.scale * x)
        case Diagonal():
            return operator.values * x
        case Dense():
            return x @ operator.matrix  # symmetric
        case BlockDiagonal():
            return _of_blocks(operator, x)
        case Placed():
            batch = x.shape[: x.ndim - len(operator.shape)]
            found = apply(
                operator.operator, x.reshape(*batch, operator.numel)[..., operator.entries]
            )
            return gathered(operator, found)
        case KroneckerSum():
            return apply(operator.first, x) + apply(operator.second, x)
        case Sum():
            return torch.stack([apply(term, x) for term in operator.terms]).sum(0)
        case Named():
            return apply(operator.operator, x)
        case _:
            raise OptionError(f"{type(operator).__name__} has no product; expected an operator.")


def _of_blocks(operator: BlockDiagonal, x: Tensor) -> Tensor:
    batch = x.shape[:-1]
    parts = x.split([block.numel for block in operator.blocks], dim=-1)
    found = [
        apply(block, part.reshape((*batch, *block.shape))).reshape(*batch, block.numel)
        for block, part in zip(operator.blocks, parts, strict=True)
    ]
    return torch.cat(found, dim=-1)


def gathered(operator: Placed, found: Tensor) -> Tensor:
    """P of arrays that the placed operator acts on: what comes twice is added."""
    batch = found.shape[: found.ndim - operator.entries.ndim]
    total = found.new_zeros(*batch, operator.numel)
    entries = operator.entries.flatten()
    moved = total.index_add(-1, entries, found.reshape(*batch, entries.numel()))
    return moved.reshape((*batch, *operator.shape))


def left(A: Tensor, x: Tensor) -> Tensor:
    """A X for every group, with A or its diagonal."""
    return A.unsqueeze(-1) * x if A.ndim == 2 else A @ x


def rotated(U: Tensor | None, V: Tensor | None, x: Tensor) -> Tensor:
    """(U ⊗ V)ᵀ x, which is Uᵀ X V."""
    x = x if U is None else U.mT @ x
    return x if V is None else x @ V


def unrotated(U: Tensor | None, V: Tensor | None, x: Tensor) -> Tensor:
    """(U ⊗ V) x, which is U X Vᵀ."""
    x = x if U is None else U @ x
    return x if V is None else x @ V.mT


def sandwich(U: Tensor | None, V: Tensor | None, values: Tensor, x: Tensor) -> Tensor:
    """(U ⊗ V) diag(values) (U ⊗ V)ᵀ x."""
    return unrotated(U, V, values * rotated(U, V, x))


@public
def transpose(operator: Operator) -> Operator:
    """Cᵀ: the operator itself, but for a `Factor` and what is made of such."""
    match operator:
        case Factor():
            return Factor(operator.U, operator.V, operator.scale, not operator.transposed)
        case BlockDiagonal():
            return BlockDiagonal(tuple(map(transpose, operator.blocks)), operator.names)
        case Sum():
            return Sum(tuple(map(transpose, operator.terms)))
        case Placed():
            return Placed(transpose(operator.operator), operator.entries, operator.into)
        case _:
            return operator
