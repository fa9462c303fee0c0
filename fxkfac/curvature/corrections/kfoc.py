"""Factors, data -> the Kronecker products that are nearest to the exact blocks.

    C = R Σ_n Σ_c vec(G) vec(G)ᵀ ≈ A ⊗ B        G_{n,c} = Σ_s x̃ gᵀ

    A = R Σ_n Σ_c G B Gᵀ / ⟨B, B⟩        B = R Σ_n Σ_c Gᵀ A G / ⟨A, A⟩

Rearranged (Van Loan and Pitsianis 1993), C is a matrix whose rows are the entries of A and whose
columns those of B, and A ⊗ B is vec(A) vec(B)ᵀ. So the nearest product is its first singular pair,
and what the two lines do in turn is power iteration: each gives the best A for B, or B for A. Terms
that lie over each other take turns at what the others leave: see `nearest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fxkfac.curvature.blocks import Block, Kronecker
from fxkfac.curvature.corrections.common import Correction, alone, products_of, shape_of
from fxkfac.curvature.corrections.corrected import Corrected
from fxkfac.curvature.corrections.datum_pass import Asked
from fxkfac.curvature.corrections.nearest import (
    Pair,
    Pairs,
    explained,
    with_left,
    with_right,
    with_unit,
)
from fxkfac.curvature.corrections.overlap import Place
from fxkfac.curvature.data import Data
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.padding import Mask
from fxkfac.errors import DataError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.linalg.contraction import Left, Right
from fxkfac.ranges import require_count, require_generator, require_not_negative


@full_precision()
def kfoc(
    program: Program,
    loss: Any,
    data: Data,
    factors: Factors,
    steps: int = 10,
    tolerance: float = 1e-4,
    params: Params | None = None,
    mask: Mask | None = None,
    generator: Generator | None = None,
    progress: bool = False,
    backend: str = "eager",
    memory: int | None = None,
) -> Corrected:
    """The Kronecker products nearest to the exact blocks, by power iteration from KFAC's.

    No step leads away from the exact block of these data in the Frobenius norm, so that the result
    is never farther from it than KFAC. Every group has a product of its own, and so does every
    term of a block: where terms lie over each other, as those of a weight in two orientations do,
    it is their sum that comes nearer. An embedding's A stays diagonal: the product is the nearest
    among such. As a product tells nothing of the scale of each factor, A keeps the trace that
    KFAC's has.

    Args:
        program, loss, factors, params, mask, progress, backend, memory: As of `fxkfac.ekfac`.
        data: As of `fxkfac.ekfac`, but to be iterated over again: each step takes two passes.
            Where labels or dropout are drawn, the batches must come in the same order each time.
        steps: Most steps.
        tolerance: Stop once the second half of a step makes no ‖A ⊗ B‖ grow by more than this
            part of it; of terms that lie over each other, no √(‖C‖² − ‖C − Σ A ⊗ B‖²).
        generator: As of `fxkfac.ekfac`; all passes draw the same labels and signs.

    Returns:
        For every block with Kronecker factors a `Block` with others, exact blocks as they were.

    Raises:
        OptionError: `steps` or `tolerance` is out of range; and as of `fxkfac.ekfac`.
        DataError: The data can be iterated over only once; and as of `fxkfac.ekfac`.
        MergeError, UnsupportedUse, BatchAxisError, NonFiniteError: As of `fxkfac.ekfac`.
    """
    _require_steps(steps, tolerance)
    _require_again(data)
    correction = Correction.of(program, loss, factors, params, mask, backend, memory)
    source = program.generator if generator is None else generator
    require_generator(source)
    state = source.get_state()
    parts, pairs = correction.parts, _of_factors(factors)
    for _ in range(steps):
        source.set_state(state)
        pairs = with_unit(pairs, 1)
        sums = correction.run(_left(pairs), data, source, progress)
        totals = _scaled(sums.totals, correction.scale(sums))
        pairs = with_left(parts, pairs, totals)
        before = explained(parts, pairs, totals, 0)
        source.set_state(state)
        pairs = with_unit(pairs, 0)
        sums = correction.run(_right(pairs), data, source, progress)
        totals = _scaled(sums.totals, correction.scale(sums))
        pairs = with_right(parts, pairs, totals)
        if _grown(before, explained(parts, pairs, totals, 1)) <= tolerance:
            break
    return correction.result(_blocks(factors, pairs), sums)


def _require_steps(steps: int, tolerance: float) -> None:
    require_count("steps", steps)
    require_not_negative("tolerance", tolerance)


def _require_again(data: Data) -> None:
    if hasattr(data, "__next__"):
        raise DataError(
            f"data is of type {type(data).__name__}, which one pass uses up; expected a pair, a "
            "list or a DataLoader, since every step takes two passes."
        )


def _of_factors(factors: Factors) -> Pairs:
    """Where the iteration begins."""
    pairs: dict[Place, Pair] = {}
    for place, p in products_of(factors).items():
        dtype = torch.promote_types(p.A.dtype, p.B.dtype)
        pairs[place] = (p.A.to(dtype), p.B.to(dtype))
    return pairs


def _left(pairs: Pairs) -> dict[Place, Asked]:
    """Σ G B Gᵀ for every term."""
    asked = {}
    for place, (A, B) in pairs.items():
        group, d_in, d_out = shape_of(A, B)
        tokens = A.ndim == 1
        start = B.new_zeros((d_in,) if tokens else (group, d_in, d_in))
        asked[place] = Asked(Left(B, tokens), (group, d_in, d_out), start)
    return asked


def _right(pairs: Pairs) -> dict[Place, Asked]:
    """Σ Gᵀ A G for every term."""
    asked = {}
    for place, (A, B) in pairs.items():
        group, d_in, d_out = shape_of(A, B)
        asked[place] = Asked(Right(A), (group, d_in, d_out), A.new_zeros(group, d_out, d_out))
    return asked


def _scaled(totals: Mapping[Place, Tensor], R: float) -> dict[Place, Tensor]:
    """By R, as C is."""
    return {place: R * total for place, total in totals.items()}


def _grown(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative growth."""
    pairs = zip(before, after, strict=True)
    return max((float(((b - a) / _positive(b)).max()) for a, b in pairs), default=0.0)


def _positive(t: Tensor) -> Tensor:
    return t.clamp_min(torch.finfo(t.dtype).tiny)


def _blocks(factors: Factors, pairs: Pairs) -> dict[str, Block]:
    blocks = {}
    for name, plan in factors.plans.items():
        terms = []
        for k, term in enumerate(plan.terms):
            A, B = _balanced(pairs[name, k], factors.products[name][k].A)
            terms.append(Kronecker(alone(A), alone(B), term, plan.offsets))
        blocks[name] = Block(plan.parameters, plan.shapes, tuple(terms))
    return blocks


def _balanced(pair: Pair, like: Tensor) -> Pair:
    """The same product, with an A that has the trace of another one."""
    A, B = pair
    wanted, has = _trace(like), _trace(A)
    factor = torch.where((wanted > 0) & (has > 0), wanted / has, torch.ones_like(has))
    if A.ndim == 1:
        return A * factor, B / factor
    factor = factor.view(-1, 1, 1)
    return A * factor, B / factor


def _trace(A: Tensor) -> Tensor:
    """That of every group; of a diagonal, (1,)."""
    return A.sum().view(1) if A.ndim == 1 else A.diagonal(dim1=1, dim2=2).sum(-1)
