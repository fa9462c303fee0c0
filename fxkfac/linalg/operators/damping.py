"""Damping: what is added to an operator so that it can be inverted, and to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.linalg.operators.algebra import add, each_part
from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Placed, Sum, identity
from fxkfac.linalg.operators.entries import trace
from fxkfac.linalg.operators.factored import Kronecker, KroneckerSum
from fxkfac.linalg.operators.named import public
from fxkfac.linalg.operators.spectra import each_block, in_place, mapped
from fxkfac.ranges import number_in, require, require_not_negative

if TYPE_CHECKING:
    from jaxtyping import Float

DAMP = ("block", "factors", "pi", "floor", "mean")


@dataclass(frozen=True)
class Damping:
    """How much damping, and of what.

    Attributes:
        value: δ.
        damp: What is damped:

            - `"block"`: C + δ I, exactly, by the eigenvalues.
            - `"factors"`: (A + √δ I) ⊗ (B + √δ I), in every Kronecker product of a sum.
            - `"pi"`: (A + π √δ I) ⊗ (B + √δ/π I) with π² = (tr A / dim A) / (tr B / dim B), so that
              both are damped alike beside their own eigenvalues (Martens & Grosse 2015, Section
              6.3); π = 1 where a factor is zero.
            - `"floor"`: eigenvalues below δ become δ.
            - `"mean"`: C + δ λ̄ I with the mean eigenvalue λ̄ = tr C / dim C, of every block.

    What has no factors is damped as a block where factors are asked for.

    Raises:
        OptionError: δ is negative, or zero where factors are damped; or `damp` is unknown.
    """

    value: float
    damp: str = "block"

    def __post_init__(self) -> None:
        if self.damp not in DAMP:
            raise OptionError(f"damp={self.damp!r}; expected one of {', '.join(map(repr, DAMP))}.")
        require_not_negative("damping", number_in(self.value))
        if self.value == 0 and self.damp in ("factors", "pi"):
            raise OptionError("damping=0; expected a positive number to damp factors with.")


@public
def damped(operator: Operator, damping: Damping) -> Operator:
    """The operator with damping.

    Raises:
        OptionError: `damping` is no `Damping`.
        NonFiniteError, OptionError: Where eigenvalues are needed, as `diagonalised`.
    """
    require(
        isinstance(damping, Damping),
        f"damping={damping!r}; expected a Damping, such as Damping(1e-3).",
    )
    match damping.damp:
        case "floor":
            return mapped(lambda λ: λ.clamp_min(damping.value), operator)
        case "block":
            return _shifted(operator, damping.value)
        case "mean":
            return _shifted_by_mean(operator, damping.value)
        case _:
            return _factors_damped(operator, damping)


def _shifted(operator: Operator, value: float | Tensor) -> Operator:
    """C + value · I. Sums stay sums: what needs no eigenvalues does not write them out."""
    match operator:
        case BlockDiagonal():
            return each_block(lambda block: _shifted(block, value), operator)
        case Placed() if not operator.repeats:
            return in_place(lambda placed: _shifted(placed, value), operator)
        case Placed() | Sum() | KroneckerSum():
            return add(operator, identity(operator.shape, operator.like, value))
        case _:
            return mapped(lambda λ: λ + value, operator)


def _shifted_by_mean(operator: Operator, value: float) -> Operator:
    if isinstance(operator, BlockDiagonal):
        return each_block(lambda block: _shifted_by_mean(block, value), operator)
    return _shifted(operator, value * trace(operator) / max(operator.numel, 1))


def _factors_damped(operator: Operator, damping: Damping) -> Operator:
    match operator:
        case Kronecker():
            root = damping.value**0.5
            π = _pi(operator) if damping.damp == "pi" else operator.like.new_ones(1)
            A, B = _plus(operator.A, π * root), _plus(operator.B, root / π)
            A_least, B_least = operator.least
            return Kronecker(A, B, A_least + π * root, B_least + root / π)
        case BlockDiagonal():
            return each_block(lambda block: _factors_damped(block, damping), operator)
        case Placed() if not operator.repeats or _has_factors(operator):
            return in_place(lambda placed: _factors_damped(placed, damping), operator)
        case Sum() | KroneckerSum() if _has_factors(operator):
            return each_part(lambda part: _term_damped(part, damping), operator)
        case _:
            return _shifted(operator, damping.value)


def _has_factors(operator: Operator) -> bool:
    """Whether a Kronecker product is in it."""
    match operator:
        case Placed():
            return _has_factors(operator.operator)
        case Sum():
            return any(map(_has_factors, operator.terms))
        case BlockDiagonal():
            return any(map(_has_factors, operator.blocks))
        case _:
            return isinstance(operator, Kronecker | KroneckerSum)


def _term_damped(operator: Operator, damping: Damping) -> Operator:
    """A term of a sum is damped where it lies, and not where others do."""
    if isinstance(operator, Placed):
        return each_part(lambda part: _factors_damped(part, damping), operator)
    return _factors_damped(operator, damping)


def _plus(factor: Tensor, shift: Float[Tensor, " group"]) -> Tensor:
    """factor + shift · I, for every group; of a diagonal the same."""
    if factor.ndim == 2:
        return factor + shift.view(-1, 1)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + shift.view(-1, 1, 1) * eye


def _pi(operator: Kronecker) -> Float[Tensor, " group"]:
    """π of every group."""
    a, b = _mean_diagonal(operator.A), _mean_diagonal(operator.B)
    fits = (a > 0) & (b > 0)
    # Each by itself: the quotient of two roots has room where that of the numbers has none.
    return torch.where(fits, a.sqrt() / torch.where(fits, b, 1).sqrt(), 1)


def _mean_diagonal(factor: Tensor) -> Float[Tensor, " group"]:
    entries = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
    return entries.sum(-1) / max(entries.shape[-1], 1)
