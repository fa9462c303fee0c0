"""Operators of operators: sums, multiples, other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Dense, Diagonal, Placed, Sum
from fxkfac.linalg.operators.entries import terms_of, to_dense
from fxkfac.linalg.operators.factored import (
    Congruence,
    Eigenbasis,
    Factor,
    Kronecker,
    KroneckerSum,
)
from fxkfac.linalg.operators.named import public
from fxkfac.ranges import number_in, require, require_not_negative


@public
def add(first: Operator, *others: Operator) -> Operator:
    """C + D + …, by their entries where these are at hand, else as a sum.

    Two Kronecker products are a `KroneckerSum`; block diagonal operators with the same blocks are
    added block by block, and placed ones in their place.

    Raises:
        ParameterError: They act on arrays of different shapes, or differ in dtype or device.
    """
    if not others:
        return first
    terms = tuple(term for operator in (first, *others) for term in terms_of(operator))
    whole = Sum(terms)  # which checks them
    match terms:
        case (Kronecker() as one, Kronecker() as other):
            return KroneckerSum(one, other)
        case (Diagonal(), *_) if all(isinstance(t, Diagonal) for t in terms):
            return Diagonal(torch.stack([t.like for t in terms]).sum(0))
        case _ if len(whole.shape) == 1 and all(isinstance(t, Dense | Diagonal) for t in terms):
            return Dense(to_dense(whole))
        case (BlockDiagonal(), *_):
            return _by_blocks(terms) or whole
        case (Placed(), *_):
            return _in_place(terms) or whole
        case _:
            return whole


def _by_blocks(terms: Sequence[Operator]) -> Operator | None:
    """The sum of block diagonal operators with the same blocks; `None` where they are not."""
    sums = [t for t in terms if isinstance(t, BlockDiagonal)]
    sizes = {tuple(block.shape for block in t.blocks) for t in sums}
    if len(sums) < len(terms) or len(sizes) > 1:
        return None
    blocks = zip(*(t.blocks for t in sums), strict=True)
    return replace(sums[0], blocks=tuple(add(*same) for same in blocks))


def _in_place(terms: Sequence[Operator]) -> Operator | None:
    """The sum of operators that are placed alike; `None` where they are not."""
    placed = [t for t in terms if isinstance(t, Placed)]
    first = placed[0]
    if len(placed) < len(terms) or not all(t.entries.equal(first.entries) for t in placed):
        return None
    return replace(first, operator=add(*(t.operator for t in placed)))


@public
def scaled(operator: Operator, factor: float) -> Operator:
    """factor · C.

    Raises:
        OptionError: The factor is negative, or not finite.
    """
    require_not_negative("factor", number_in(factor))
    match operator:
        case Kronecker():
            return replace(operator, B=factor * operator.B, B_least=factor * operator.least[1])
        case Eigenbasis():
            return replace(operator, eigenvalues=factor * operator.eigenvalues)
        case Congruence():
            return replace(operator, values=factor * operator.values)
        case Factor():
            return replace(operator, scale=factor * operator.scale)
        case Diagonal():
            return Diagonal(factor * operator.values)
        case Dense():
            return Dense(factor * operator.matrix)
        case _:
            return each_part(lambda part: scaled(part, factor), operator)


@public
def to_dtype(operator: Operator, dtype: torch.dtype) -> Operator:
    """The same operator with tensors of another dtype.

    So badly conditioned factors are taken apart in float64, and used in what they came in:
    `to_dtype(power(to_dtype(C, torch.float64), -1), torch.float32)`.

    Args:
        operator: C, of which nothing is changed.
        dtype: A floating dtype.

    Raises:
        OptionError: It is none.
    """
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(floating, f"dtype={dtype!r}; expected a floating dtype, such as torch.float64.")
    if isinstance(operator, Sum | KroneckerSum | BlockDiagonal | Placed):
        return each_part(lambda part: to_dtype(part, dtype), operator)
    assert is_dataclass(operator)
    held = {f.name: getattr(operator, f.name) for f in fields(operator)}
    return replace(operator, **{k: t.to(dtype) for k, t in held.items() if isinstance(t, Tensor)})


def each_part(function: Callable[[Operator], Operator], operator: Operator) -> Operator:
    """An operator that is put together of others, with a function of these in their place."""
    match operator:
        case Sum():
            return Sum(tuple(map(function, operator.terms)))
        case KroneckerSum():
            return add(function(operator.first), function(operator.second))
        case BlockDiagonal():
            return replace(operator, blocks=tuple(map(function, operator.blocks)))
        case Placed():
            return replace(operator, operator=function(operator.operator))
        case _:
            raise OptionError(f"{type(operator).__name__} has no parts; expected an operator.")
