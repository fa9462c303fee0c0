"""An operator -> its eigenvalues in few numbers, none of which are listed for it.

    λ_max(A ⊗ B) = λ_max(A) λ_max(B)    rank (A ⊗ B) = rank A · rank B    tr (A ⊗ B) = tr A · tr B

and so for the smallest one and for the sum of squares; blocks add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Placed
from fxkfac.linalg.operators.entries import trace
from fxkfac.linalg.operators.factored import Kronecker
from fxkfac.linalg.operators.named import public
from fxkfac.linalg.operators.spectra import eigenvalues, of_blocks
from fxkfac.linalg.operators.symmetric import factor_eigenvalues

if TYPE_CHECKING:
    from jaxtyping import Float


@final
@dataclass(frozen=True)
class Summary:
    """What is told of the eigenvalues of a positive semi-definite matrix.

    Attributes:
        numel: How many there are.
        rank: How many are not zero, up to rounding.
        largest: The largest one; zero where there are none.
        smallest: The smallest one, which is zero where it is so up to rounding.
        trace: Their sum.
        squares: The sum of their squares.
    """

    numel: int
    rank: int
    largest: float
    smallest: float
    trace: float
    squares: float

    @property
    def condition(self) -> float:
        """The largest over the smallest; ∞ where the matrix is singular or has no rows."""
        return self.largest / self.smallest if self.smallest else float("inf")

    @property
    def effective_rank(self) -> float:
        """(Σ λ)² / Σ λ²: how many equal ones would have this sum and this sum of squares."""
        return self.trace**2 / self.squares if self.squares else 0.0


def joined(parts: Sequence[Summary]) -> Summary:
    """Of a block diagonal matrix, from its blocks."""
    held = [part for part in parts if part.numel]
    return Summary(
        sum(part.numel for part in held),
        sum(part.rank for part in held),
        max((part.largest for part in held), default=0.0),
        min((part.smallest for part in held), default=0.0),
        sum((part.trace for part in held), 0.0),
        sum((part.squares for part in held), 0.0),
    )


@public
def summary(operator: Operator) -> Summary:
    """Number, rank, extremes and sums of the eigenvalues of an operator, computed in its dtype.

    Products of factors' eigenvalues are taken in float64, where they neither vanish nor overflow.
    A sum of Kronecker products is written out for it.

    Raises as `eigenvalues`.
    """
    return Summaries().of(operator)


@final
class Summaries:
    """Summaries of operators; a factor that several of them hold is taken apart once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Tensor, _Factor]] = {}

    def of(self, operator: Operator) -> Summary:
        """As `summary`."""
        match operator:
            case Kronecker():
                A_least, B_least = operator.least
                A, B = self._factor(operator.A, A_least), self._factor(operator.B, B_least)
                return A.times(B).joined()
            case BlockDiagonal():
                return joined(of_blocks(self.of, operator))
            case Placed() if not operator.repeats:
                return joined([self.of(operator.operator), _zeros(operator)])
            case _:
                λ = eigenvalues(operator).detach().cpu().double()
                total = trace(operator).detach().cpu().double()
                return _Factor.of(λ.view(1, -1), total.view(1)).joined()

    def _factor(self, factor: Tensor, least: Tensor) -> _Factor:
        key = (factor.data_ptr(), factor.device, tuple(factor.shape), factor.stride())
        if key not in self._known:
            entries = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
            λ = factor_eigenvalues(factor, least).detach().cpu().double()
            found = _Factor.of(λ, entries.detach().cpu().double().sum(-1))
            self._known[key] = factor, found  # while it is held, no other one is at its address
        return self._known[key][1]


def _zeros(operator: Placed) -> Summary:
    """Of what a placed operator leaves empty."""
    return Summary(operator.numel - operator.entries.numel(), 0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class _Factor:
    """The fields of a summary for every group of a factor, float64 on the CPU."""

    numel: int
    rank: Float[Tensor, " group"]
    largest: Float[Tensor, " group"]
    smallest: Float[Tensor, " group"]
    trace: Float[Tensor, " group"]
    squares: Float[Tensor, " group"]

    @staticmethod
    def of(λ: Float[Tensor, "group d"], total: Float[Tensor, " group"]) -> _Factor:
        """From all eigenvalues; the trace comes from the entries, which rounding leaves whole."""
        groups, d = λ.shape
        some = λ if d else λ.new_zeros(groups, 1)
        rank = torch.count_nonzero(λ, -1).double()
        return _Factor(d, rank, some.amax(-1), some.amin(-1), total, λ.square().sum(-1))

    def times(self, other: _Factor) -> _Factor:
        """Of the Kronecker product."""
        return _Factor(
            self.numel * other.numel,
            self.rank * other.rank,
            self.largest * other.largest,
            self.smallest * other.smallest,
            self.trace * other.trace,
            self.squares * other.squares,
        )

    def joined(self) -> Summary:
        """Of all groups along one diagonal."""
        if not len(self.trace):
            return Summary(0, 0, 0.0, 0.0, 0.0, 0.0)
        return Summary(
            len(self.trace) * self.numel,
            int(self.rank.sum()),
            float(self.largest.max()),
            float(self.smallest.min()),
            float(self.trace.sum()),
            float(self.squares.sum()),
        )
