"""Sums of one batch, or of all batches so far."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxkfac.curvature.factors import Factors, Product, divisor, scale_of
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.plan import TermPlan, require_same_terms
from fxkfac.curvature.schedule import Schedule
from fxkfac.curvature.settings import Settings
from fxkfac.functional import FunctionalModel
from fxkfac.graph.uses.normal import normal_weight
from fxkfac.isolation import are_finite
from fxkfac.likelihoods.base import Likelihood


@dataclass
class Accumulated:
    """The sums of some data.

    Attributes:
        n: Number of data.
        count: What `reduction="mean"` divides by.
        inputs: For every term, what its A is made of; one object for terms with the same.
        outputs: For every term, Σ g gᵀ.
        exact: Exact blocks, without R.
    """

    schedule: Schedule
    n: int
    count: float
    inputs: list[InputSums]
    outputs: list[Moment]
    exact: dict[str, Tensor]

    def copy(self) -> Accumulated:
        """The same sums, of which one may be used up."""
        memo: dict[int, Any] = {}  # one object for terms with the same A, there as here
        inputs, outputs = copy.deepcopy(self.inputs, memo), copy.deepcopy(self.outputs, memo)
        return replace(self, inputs=inputs, outputs=outputs, exact=dict(self.exact))

    def require_same_terms(self, other: Accumulated) -> None:
        """Raise `MergeError` unless both are sums of the same terms."""
        require_same_terms(self.schedule.blocks, other.schedule.blocks)

    def merge(self, other: Accumulated) -> None:
        """Add the sums of further data, of the same terms, which are used up."""
        self.n += other.n
        self.count += other.count
        if same_objects(self.inputs) != same_objects(other.inputs):
            self.inputs, other.inputs = _each_its_own(self.inputs), _each_its_own(other.inputs)
        for k, first in enumerate(same_objects(self.inputs)):
            if k == first:
                self.inputs[k].merge(other.inputs[k])
        for mine, more in zip(self.outputs, other.outputs, strict=True):
            mine.merge(more)
        for name, block in other.exact.items():
            self.exact[name] = self.exact[name] + block

    def not_finite(self) -> str | None:
        """What holds NaN or Inf, if anything does."""
        sums: list[InputSums | Moment] = [*self.inputs, *self.outputs]
        numbers = [*self.exact.values(), *(t for s in sums for t in s.numbers())]
        if are_finite(numbers):
            return None
        for name, block in self.exact.items():
            if not block.isfinite().all():
                return f"the exact block of {name!r}"
        for k, term in enumerate(self.schedule.terms):
            for what, s in (("A", self.inputs[k]), ("B", self.outputs[k])):
                if not s.is_finite():
                    return f"factor {what} of {term.parameters[0]!r}"
        return None

    def factors(
        self, settings: Settings, model: FunctionalModel, likelihood: Likelihood
    ) -> Factors:
        """The factors of these data, whose sums are used up."""
        R = scale_of(likelihood, self.count)
        a: list[Tensor] = []
        for k, first in enumerate(same_objects(self.inputs)):
            a.append(a[first] if first < k else self.inputs[k].matrix(R))
        products = {
            term: Product(a[k], self._output(k, term, a[k]), self.inputs[k].rows)
            for k, term in enumerate(self.schedule.terms)
        }
        return Factors(
            settings=settings,
            n=self.n,
            count=self.count,
            model=model,
            likelihood=likelihood,
            plans={block.name: block for block in self.schedule.blocks},
            products={b.name: tuple(products[t] for t in b.terms) for b in self.schedule.blocks},
            exact={name: R * block for name, block in self.exact.items()},
        )

    def _output(self, k: int, term: TermPlan, like: Tensor) -> Tensor:
        """(1/#rows) Σ g gᵀ; zeros where nothing comes back."""
        rows = divisor(self.inputs[k].rows)
        scale = rows.to(like.dtype).reciprocal() if isinstance(rows, Tensor) else 1 / rows
        B = self.outputs[k].matrix(scale)
        if B is not None:
            return B
        if term.is_bias:
            return like.new_zeros(1, len(term.touched()), len(term.touched()))
        groups, _, out = normal_weight(term.uses[0]).shape
        return like.new_zeros(groups, out, out)


def same_objects(inputs: list[InputSums]) -> list[int]:
    """For each one, where the same object is found first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(sums), k) for k, sums in enumerate(inputs)]


def _each_its_own(inputs: list[InputSums]) -> list[InputSums]:
    return [copy.deepcopy(sums) for sums in inputs]
