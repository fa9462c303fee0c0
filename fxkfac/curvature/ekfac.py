"""Factors, data -> the same eigenvectors, with eigenvalues that are right (George et al. 2018).

    A = Q_A Λ_A Q_Aᵀ    B = Q_B Λ_B Q_Bᵀ    G_{n,c} = Σ_s x̃ gᵀ

    C ≈ (Q_A ⊗ Q_B) diag(Λ) (Q_A ⊗ Q_B)ᵀ    Λ = R Σ_n Σ_c (Q_Aᵀ G_{n,c} Q_B)²

Λ is the diagonal of the exact block C in that basis, and so the diagonal nearest to it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fxkfac.curvature.correct import Asked, Place, TermSums
from fxkfac.curvature.corrected import Corrected
from fxkfac.curvature.correction import Correction, alone, products_of, shape_of
from fxkfac.curvature.data import Data
from fxkfac.curvature.eigen import EigenBlock, EigenTerm
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.padding import Mask
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.linalg.contraction import Squares


@full_precision()
def ekfac(
    program: Program,
    loss: Any,
    data: Data,
    factors: Factors,
    params: Params | None = None,
    mask: Mask | None = None,
    generator: Generator | None = None,
    progress: bool = False,
    backend: str = "eager",
    memory: int | None = None,
) -> Corrected:
    """Kronecker factors with corrected eigenvalues, by one more pass over data.

    Args:
        program, loss: As of `fxkfac.kfac`.
        data: Those of the factors; or others, which then decide the eigenvalues alone.
        factors: What `fxkfac.kfac` returned; the flavour and all other settings are theirs.
        params, mask, progress, backend, memory: As of `fxkfac.kfac`.
        generator: Source of random labels and signs. One in the state that `kfac` began with draws
            the same ones for the same batches. Default: the program's own, which goes on.

    Returns:
        For every block with Kronecker factors an `EigenBlock`, exact blocks as they were. A block
        of several parts has a basis for each.

    Raises:
        MergeError: The factors are those of another program or loss, or computed otherwise, or
            when parameters had other values.
        OptionError: They are no factors, or have fisher="forward-only".
        UnsupportedUse: A block is a sum of overlapping products: its parameter is used in
            different orientations.
        BatchAxisError: It is not known which datum a row belongs to, or data are coupled.
        DataError, NonFiniteError: As of `fxkfac.kfac`.
    """
    correction = Correction.of(program, loss, factors, params, mask, backend, memory)
    asked = _bases(factors)
    sums = correction.run(asked, data, generator or program.generator, progress)
    R = correction.scale(sums)
    return correction.result(_blocks(factors, asked, sums, R), sums)


def _bases(factors: Factors) -> dict[Place, Asked]:
    """What is summed for each term, by the eigenvectors of its factors."""
    known: dict[int, Tensor] = {}  # equal inputs have one A
    asked = {}
    for place, product in products_of(factors).items():
        A, B = product.A, product.B
        dtype = torch.promote_types(A.dtype, B.dtype)
        if A.ndim > 1 and id(A) not in known:
            known[id(A)] = torch.linalg.eigh(A.to(dtype)).eigenvectors
        Q_B = torch.linalg.eigh(B.to(dtype)).eigenvectors
        shape = shape_of(A, B)
        asked[place] = Asked(Squares(known.get(id(A)), Q_B), shape, Q_B.new_zeros(shape))
    return asked


def _blocks(
    factors: Factors, asked: Mapping[Place, Asked], sums: TermSums, R: float
) -> dict[str, EigenBlock]:
    blocks = {}
    for name, plan in factors.plans.items():
        terms = []
        for k, term in enumerate(plan.terms):
            basis = asked[name, k].statistic
            assert isinstance(basis, Squares)
            Q_A = None if basis.Q_A is None else alone(basis.Q_A)
            eigenvalues = alone(R * sums.totals[name, k])
            terms.append(EigenTerm(Q_A, alone(basis.Q_B), eigenvalues, term, plan.offsets))
        blocks[name] = EigenBlock(plan.parameters, plan.shapes, tuple(terms))
    return blocks
