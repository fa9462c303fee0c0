"""Factors, data -> the same eigenvectors, with eigenvalues that are right (George et al. 2018).

    A = Q_A Λ_A Q_Aᵀ    B = Q_B Λ_B Q_Bᵀ    G_{n,c} = Σ_s x̃ gᵀ

    C ≈ (Q_A ⊗ Q_B) diag(Λ) (Q_A ⊗ Q_B)ᵀ    Λ = R Σ_n Σ_c (Q_Aᵀ G_{n,c} Q_B)²

Λ is the diagonal of the exact block C in that basis, and so the diagonal nearest to it there. Terms
that lie over each other have one each, which together are nearest: see `fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fxkfac.curvature.corrections.common import Correction, alone, products_of
from fxkfac.curvature.corrections.corrected import Corrected
from fxkfac.curvature.corrections.datum_pass import Asked
from fxkfac.curvature.corrections.fit import nearest_eigenvalues
from fxkfac.curvature.corrections.overlap import Place
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
        of several terms has a basis for each; where these lie over each other, as those of a weight
        in two orientations do, the eigenvalues are the non-negative ones whose sum is nearest.

    Raises:
        MergeError: The factors are those of another program or loss, or computed otherwise, or
            when parameters had other values.
        OptionError: They are no factors, or have fisher="forward-only".
        UnsupportedUse: A block is a sum of products that have some of their entries in common: its
            parameter is used in parts that overlap.
        BatchAxisError: It is not known which datum a row belongs to, or data are coupled.
        DataError, NonFiniteError: As of `fxkfac.kfac`.
    """
    correction = Correction.of(program, loss, factors, params, mask, backend, memory)
    bases = _bases(factors)
    asked = {place: _asked(basis) for place, basis in bases.items()}
    source = program.generator if generator is None else generator
    sums = correction.run(asked, data, source, progress)
    R = correction.scale(sums)
    found: dict[Place, Tensor] = {}
    for part in correction.parts:
        diagonals = {place: R * sums.totals[place] for place in part}
        own = {place: bases[place].own for place in part}
        turns = {place: bases[place].turn for place in part}
        found |= nearest_eigenvalues(part, turns, diagonals, own)
    return correction.result(_blocks(factors, bases, found), sums)


@dataclass(frozen=True)
class _Basis:
    """Of one term.

    Attributes:
        turn: By Q_A and Q_B.
        own: The eigenvalues that KFAC has there, (group, in, out).
    """

    turn: Squares
    own: Tensor


def _bases(factors: Factors) -> dict[Place, _Basis]:
    """The eigenvectors of the factors of every term."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # equal inputs have one A
    found = {}
    for place, product in products_of(factors).items():
        A, B = product.A, product.B
        dtype = torch.promote_types(A.dtype, B.dtype)
        if A.ndim > 1 and id(A) not in known:
            known[id(A)] = _eigh(A.to(dtype))
        λ_A, Q_A = known.get(id(A), (A.unsqueeze(0), None))
        λ_B, Q_B = _eigh(B.to(dtype))
        own = λ_A.clamp_min(0).unsqueeze(-1) * λ_B.clamp_min(0).unsqueeze(-2)
        found[place] = _Basis(Squares(Q_A, Q_B), own)
    return found


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.linalg.eigh(factor)
    return found.eigenvalues, found.eigenvectors


def _asked(basis: _Basis) -> Asked:
    group, d_in, d_out = basis.own.shape
    start = torch.zeros_like(basis.own)
    return Asked(basis.turn, (group, d_in, d_out), start)


def _blocks(
    factors: Factors, bases: Mapping[Place, _Basis], eigenvalues: Mapping[Place, Tensor]
) -> dict[str, EigenBlock]:
    blocks = {}
    for name, plan in factors.plans.items():
        terms = []
        for k, term in enumerate(plan.terms):
            basis = bases[name, k].turn
            Q_A = None if basis.Q_A is None else alone(basis.Q_A)
            own = alone(eigenvalues[name, k])
            terms.append(EigenTerm(Q_A, alone(basis.Q_B), own, term, plan.offsets))
        blocks[name] = EigenBlock(plan.parameters, plan.shapes, tuple(terms))
    return blocks
