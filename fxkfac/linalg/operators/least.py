"""How an operator is put together -> what its eigenvalues are no smaller than, without any of them.

Damping that was added to a sum is lost in the rounding of its matrix where it is small beside the
largest eigenvalue; but it was added, and so it is there (Weyl 1912).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxkfac.linalg.operators.base import Operator
from fxkfac.linalg.operators.composed import BlockDiagonal, Diagonal, Placed, Sum
from fxkfac.linalg.operators.factored import Eigenbasis, Kronecker, KroneckerSum


def least(operator: Operator) -> Tensor:
    """A lower bound of all eigenvalues of a semi-definite operator; zero where nothing is known."""
    match operator:
        case Diagonal():
            return _smallest(operator.values)
        case Eigenbasis():
            return _smallest(operator.eigenvalues)
        case Kronecker():
            A, B = operator.least
            return _smallest(A * B)
        case KroneckerSum():
            return least(operator.first) + least(operator.second)
        case Sum():
            return torch.stack([least(term) for term in operator.terms]).sum()
        case BlockDiagonal():
            return torch.stack([least(block) for block in operator.blocks]).min()
        case Placed():
            found = least(operator.operator)
            is_full = bool((operator.counts > 0).all())
            return found if is_full else found.clamp_max(0)
        case _:
            return operator.like.new_zeros(())


def _smallest(values: Tensor) -> Tensor:
    """The smallest, of none ∞; where one is negative, nothing is known of a sum with others."""
    if not values.numel():
        return values.new_full((), torch.inf)
    found = values.min()
    return torch.where(found >= 0, found, -torch.inf)
