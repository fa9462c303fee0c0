"""Diagonals of a block in several eigenbases -> the nearest sum of diagonals in these.

    min ‖C − Σ_k P_k diag(Λ_k) P_kᵀ‖ over Λ ≥ 0, with P_k = Q_A,k ⊗ Q_B,k

    Λ_k <- max(0, d_k − Σ_{j≠k} diag(P_kᵀ P_j diag(Λ_j) P_jᵀ P_k)), d_k = diag(P_kᵀ C P_k)

Each line is the least one over Λ_k ≥ 0 for the others as they are (the columns of P_k are
orthonormal), so that no line leads away from C. Where Λ_k > 0 it ends at the diagonal of what the
other terms leave. Of P_k only the squares of P_kᵀ P_j are needed, and these are Kronecker products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxkfac.curvature.corrections.overlap import Overlap, Place, over
from fxkfac.linalg.contraction import Squares
from fxkfac.linalg.operators.products import unrotated

ROUNDS = 200  # at most; a round costs as much as some products of factors

Sides = tuple[Tensor | None, Tensor | None]  # squares of P_kᵀ P_j; `None` for the identity


def nearest_eigenvalues(
    part: Overlap,
    bases: Mapping[Place, Squares],
    diagonals: Mapping[Place, Tensor],
    start: Mapping[Place, Tensor],
) -> dict[Place, Tensor]:
    """The Λ_k of every term of a part, (group, in, out); of a single one its diagonal, as it is.

    Args:
        part: The terms.
        bases: Q_A and Q_B of each.
        diagonals: d_k, (group, in, out) as the term lies.
        start: Where the iteration begins, non-negative.
    """
    found = {place: start[place] for place in part}
    if len(part) == 1:
        return {place: diagonals[place] for place in part}
    sides = {(k, j): _sides(part, k, j, bases[k], bases[j]) for k in part for j in part if j != k}
    enough = torch.finfo(next(iter(found.values())).dtype).eps ** (2 / 3)
    for _ in range(ROUNDS):
        before = dict(found)
        for k in part:
            others = [_seen(part, k, j, sides[k, j], found[j]) for j in part if j != k]
            found[k] = (diagonals[k] - torch.stack(others).sum(0)).clamp_min(0)
        if all(_is_close(found[k], before[k], enough) for k in part):
            break
    return found


def _is_close(after: Tensor, before: Tensor, enough: float) -> bool:
    """In every group by itself."""
    return bool(((after - before).abs() <= enough * after.amax((1, 2), keepdim=True)).all())


def _seen(part: Overlap, k: Place, j: Place, sides: Sides, eigenvalues: Tensor) -> Tensor:
    """The diagonal of term j in the basis of term k."""
    turned = part[k].turned != part[j].turned
    return unrotated(*sides, eigenvalues.mT if turned else eigenvalues)


def _sides(part: Overlap, k: Place, j: Place, mine: Squares, theirs: Squares) -> Sides:
    """The squares of P_kᵀ P_j, along what both have of the weight."""
    Q_A, their_A = (
        None if basis.Q_A is None else part[place].weight(basis.Q_A)
        for place, basis in ((k, mine), (j, theirs))
    )
    A, B = over(part, k, j, their_A, theirs.Q_B)
    return _squares(Q_A, A), _squares(mine.Q_B, B)


def _squares(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """(Qᵀ Q')² of two matrices with orthonormal rows or columns."""
    if mine is None or theirs is None:
        product = theirs if mine is None else mine.mT
    else:
        product = mine.mT @ theirs
    return None if product is None else product.square()
