"""Sums over the data -> the factors that are best for the others as they are.

    min ‖C − Σ_k A_k ⊗ B_k‖ over positive semi-definite factors

    A_k <- (R Σ_n Σ_c G B_k Gᵀ − Σ_{j≠k} A_j ⟨B_j, B_k⟩) / ⟨B_k, B_k⟩, eigenvalues clamped at 0

and likewise B_k, with A and B changing places. As ‖A ⊗ B‖ = ‖A‖ ‖B‖, the distance is isotropic in
A_k, so that the clamped matrix is the nearest among the semi-definite ones, and no line leads away
from C. All G B_k Gᵀ come from one pass. A term by itself has no others, and nothing to clamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxkfac.curvature.corrections.overlap import Overlap, Place, over

Pair = tuple[Tensor, Tensor]  # A and B of one term, with their group axis
Pairs = Mapping[Place, Pair]


def with_unit(pairs: Pairs, side: int) -> Pairs:
    """The same products, with factors of one side whose largest entry is one, in every group.

    So there is room for their squares, however small or large gradients are.
    """
    found: dict[Place, Pair] = {}
    for place, pair in pairs.items():
        factor, other = pair[side], pair[1 - side]
        groups = 1 if factor.ndim == 1 else len(factor)
        alike = groups == (1 if other.ndim == 1 else len(other))
        size = _size(factor.reshape(groups if alike else 1, -1))
        unit = factor / _beside(size, factor)
        rest = other * _beside(size, other)
        found[place] = (unit, rest) if side == 0 else (rest, unit)
    return found


def _size(rows: Tensor) -> Tensor:
    """The largest entry of every row; one where all are zero."""
    found = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    return torch.where(found > 0, found, torch.ones_like(found))


def _beside(scale: Tensor, factor: Tensor) -> Tensor:
    """One number for every group, as a factor is multiplied by it."""
    return scale if factor.ndim == 1 else scale.view(-1, 1, 1)


def with_left(parts: Sequence[Overlap], pairs: Pairs, sums: Mapping[Place, Tensor]) -> Pairs:
    """The best A for every B, one after the other where terms lie over each other.

    Args:
        parts: All terms.
        pairs: Their factors.
        sums: R Σ G B Gᵀ for every term.
    """
    found = dict(pairs)
    for part in parts:
        for k in part:
            A, B = found[k]
            rest = sums[k]
            for F, H in _others(part, found, k):
                rest = rest - _like(A, _product(H, B).view(-1, 1, 1) * F)
            squared = inner(B)
            A = _divided(rest, squared[0] if rest.ndim == 1 else squared)
            found[k] = (_semidefinite(A) if len(part) > 1 else A), B
    return found


def with_right(parts: Sequence[Overlap], pairs: Pairs, sums: Mapping[Place, Tensor]) -> Pairs:
    """The best B for every A; `sums` are R Σ Gᵀ A G."""
    found = dict(pairs)
    for part in parts:
        for k in part:
            A, B = found[k]
            rest, weight = sums[k], _weight(part, k, A)
            for F, H in _others(part, found, k):
                rest = rest - _product(F, weight).view(-1, 1, 1) * H
            B = _divided(rest, inner(A))
            found[k] = A, (_semidefinite(B) if len(part) > 1 else B)
    return found


def explained(
    parts: Sequence[Overlap], pairs: Pairs, sums: Mapping[Place, Tensor], side: int
) -> list[Tensor]:
    """√(‖C‖² − ‖C − Ĉ‖²) of every part and group; of a single term that is ‖A ⊗ B‖.

    Args:
        parts, pairs: As above, after a half step, the other side being as of `with_unit`.
        sums: Those of the half step.
        side: Which factor that was of: 0 is A.
    """
    found = []
    for part in parts:
        size = _size(torch.cat([pairs[k][side].flatten() for k in part]).unsqueeze(0))
        small = {k: _smaller(pairs[k], side, size) for k in part}
        total: Tensor | None = None
        for k in part:
            A, B = small[k]
            own = inner(A) * inner(B)
            if len(part) > 1:  # 2 ⟨C, Ĉ⟩ − ⟨Ĉ, Ĉ⟩
                own = 2 * _product(sums[k] / size, small[k][side]) - own
                for F, H in _others(part, small, k):
                    own = own - _product(F, _weight(part, k, A)) * _product(H, B)
            total = own if total is None else total + own
        assert total is not None
        found.append(size * total.clamp_min(0).sqrt())
    return found


def _smaller(pair: Pair, side: int, size: Tensor) -> Pair:
    A, B = pair
    return (A / size, B) if side == 0 else (A, B / size)


def inner(factor: Tensor) -> Tensor:
    """⟨F, F⟩ of every group; of a diagonal, (1,)."""
    return factor.square().flatten(-1 if factor.ndim == 1 else 1).sum(-1).view(-1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """⟨F, H⟩ of every group, of two matrices or two diagonals."""
    return (one * other).flatten(-1 if one.ndim == 1 else 1).sum(-1).view(-1)


def _others(part: Overlap, pairs: Pairs, k: Place) -> Iterator[Pair]:
    """The factors of the other terms, of what they have of the weight, in the layout of this."""
    for j in part:
        if j != k:
            A, B = pairs[j]
            yield over(part, k, j, _weight(part, j, A), B)


def _weight(part: Overlap, k: Place, A: Tensor) -> Tensor:
    """What A has of the weight, (group, in, in)."""
    if A.ndim == 1:
        return torch.diag(A).unsqueeze(0)
    return part[k].weight(part[k].weight(A), -1)


def _like(A: Tensor, matrix: Tensor) -> Tensor:
    """A matrix over what A has of the weight as one over all of it, or its diagonal."""
    if A.ndim == 1:
        return matrix[0].diagonal()
    columns = A.shape[-1] - matrix.shape[-1]
    return torch.nn.functional.pad(matrix, (0, columns, 0, columns))


def _divided(total: Tensor, squared: Tensor) -> Tensor:
    """The sum over ⟨F, F⟩, symmetric to the last digit; zero where the other factor is zero."""
    if total.ndim == 3:
        total, squared = (total + total.mT) / 2, squared.view(-1, 1, 1)
    return torch.where(squared > 0, total / squared, torch.zeros_like(total))


def _semidefinite(factor: Tensor) -> Tensor:
    """The nearest one without negative eigenvalues."""
    if factor.ndim == 1:
        return factor.clamp_min(0)
    λ, Q = torch.linalg.eigh(factor)
    found = (Q * λ.clamp_min(0).unsqueeze(-2)) @ Q.mT
    return (found + found.mT) / 2
