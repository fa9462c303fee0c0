"""What passes that correct factors have in common: what they refuse, run and return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from fxkfac.curvature.corrections.corrected import Corrected
from fxkfac.curvature.corrections.datum_pass import Asked, CorrectionPass, TermSums, places
from fxkfac.curvature.corrections.overlap import Overlap, Place, parts_of
from fxkfac.curvature.curvature import AnyBlock
from fxkfac.curvature.data import Data, batches
from fxkfac.curvature.factors import Factors, Product, require_factors
from fxkfac.curvature.options import settings_again
from fxkfac.curvature.padding import Mask
from fxkfac.curvature.point import require_here
from fxkfac.curvature.settings import Settings, differences
from fxkfac.errors import MergeError, OptionError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.losses import likelihood_of


@dataclass(frozen=True)
class Correction:
    """Factors, and how passes over data that correct them are run."""

    program: Program
    likelihood: Likelihood
    factors: Factors
    parts: tuple[Overlap, ...]
    params: Params | None
    mask: Mask | None
    backend: str
    memory: int | None

    @staticmethod
    def of(
        program: Program,
        loss: Any,
        factors: Factors,
        params: Params | None,
        mask: Mask | None,
        backend: str,
        memory: int | None,
    ) -> Correction:
        """Refuse what does not go together; see `fxkfac.ekfac`."""
        likelihood = likelihood_of(loss)
        require_factors(factors)
        _require_gradients(factors)
        had = factors.settings
        _require_same(had, settings_again(program, loss, had, mask is not None))
        require_here(factors.point, program.state(params))
        parts = tuple(part for plan in factors.plans.values() for part in parts_of(plan))
        return Correction(program, likelihood, factors, parts, params, mask, backend, memory)

    def run(
        self, asked: Mapping[Place, Asked], data: Data, generator: Generator, progress: bool
    ) -> TermSums:
        """One pass over the data."""
        over = CorrectionPass(
            self.program,
            self.likelihood,
            self.factors.settings,
            self.params,
            self.mask,
            generator,
            self.backend,
            self.memory,
            blocks=self.factors.plans,
            parts=self.parts,
            asked=asked,
        )
        over.add_all(batches(data, progress))
        assert over.total is not None
        return over.total

    def scale(self, sums: TermSums) -> float:
        """R for these data. Raises `DataError` where no target counts."""
        return self.likelihood.reduction_factor(sums.count)

    def result(self, blocks: Mapping[str, AnyBlock], sums: TermSums) -> Corrected:
        """These blocks, and the others of the factors."""
        every = {
            name: blocks[name] if name in blocks else self.factors[name] for name in self.factors
        }
        orders: dict[str, tuple[Any, ...]] = {}
        for (name, _), order in sums.orders.items():
            orders[name] = (*orders.get(name, ()), order)
        return Corrected(self.factors, every, sums.n, sums.count, orders)


def products_of(factors: Factors) -> dict[Place, Product]:
    """A and B of every term."""
    return {(name, k): factors.products[name][k] for name, k in places(factors.plans)}


def shape_of(A: Tensor, B: Tensor) -> tuple[int, int, int]:
    """(group, in, out) of the gradients whose factors these are."""
    return (len(B) if A.ndim == 1 else max(len(A), len(B)), A.shape[-1], B.shape[-1])


def alone(t: Tensor) -> Tensor:
    """Without the group axis where there is but one."""
    return t[0] if t.ndim == 3 and len(t) == 1 else t


def _require_gradients(factors: Factors) -> None:
    if factors.settings.fisher == "forward-only":
        raise OptionError(
            "these factors have fisher='forward-only', which sends nothing back, but corrections "
            "are made of gradients; expected factors of another fisher."
        )


def _require_same(mine: Settings, theirs: Settings) -> None:
    """Raise `MergeError` unless the factors were computed as they would be now."""
    for name, (had, has) in differences(mine, theirs).items():
        raise MergeError(
            f"these factors were computed with {name}={had!r}, but program and arguments say "
            f"{has!r}; expected the same. Pass the program, loss and mask of fxkfac.kfac, or "
            "compute the factors anew."
        )
