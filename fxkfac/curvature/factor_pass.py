"""The pass that sums A and B, and the exact blocks -> factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fxkfac.curvature.accumulated import Accumulated
from fxkfac.curvature.batch import Batch, Pass
from fxkfac.curvature.collect import Collector
from fxkfac.curvature.diagonal import gradient_moments
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.perdatum import zero_moment
from fxkfac.curvature.point import Point, here
from fxkfac.curvature.schedule import Schedule
from fxkfac.errors import NoDataError
from fxkfac.graph.structure import EXACT


@dataclass
class FactorPass(Pass[Collector, Accumulated]):
    """The pass that sums A and B.

    Attributes:
        point: Where the parameters were at the first batch.
    """

    point: Point | None = field(init=False, default=None)

    def add(self, inputs: Any, targets: Any) -> None:
        """Add one batch; one that fails adds nothing, and has drawn nothing."""
        super().add(inputs, targets)
        if self.batches == 1:
            self.mark()

    def mark(self) -> None:
        """Remember where the parameters are."""
        self.point = here(self.program, self.state)

    def run(self, data: Iterable[tuple[Any, Any]]) -> Factors:
        """Add all batches. What stops that carries the factors of those before."""
        try:
            self.add_all(data)
        except BaseException as error:
            if self.total is not None and self._whole:
                error.factors = self.factors()  # type: ignore[attr-defined]
                n = self.total.n
                error.add_note(f"The factors of the first {n} data are in this error's .factors.")
            elif isinstance(error, NoDataError):
                error.part = self.part(self.factors())
            raise
        factors = self.factors()
        try:
            self.likelihood.reduction_factor(factors.count)
        except NoDataError as error:
            error.part = self.part(factors)
            raise
        return factors

    def part(self, factors: Factors) -> object:
        """What these data add to larger data."""
        return factors

    @property
    def schedule(self) -> Schedule:
        """That of the sums; of the example, as long as there are none."""
        if self.total is not None:
            return self.total.schedule
        return self._schedule(self.program.tapped)

    def factors(self) -> Factors:
        """What was added so far, which is used up; without blocks before the first batch."""
        if self.total is None:
            return self._of_no_data()
        return self.of(self.total)

    def of(self, total: Accumulated) -> Factors:
        """The factors of sums, which are used up."""
        factors = total.factors(self.settings, self.program.model, self.likelihood)
        stays = self.batches == 1 or self.point == here(self.program, self.state)
        return replace(factors, point=self.point if stays else None)

    def _of_no_data(self) -> Factors:
        plans = {block.name: block for block in self.schedule.blocks}
        return Factors(
            self.settings, 0, 0.0, self.program.model, self.likelihood, plans, products={}, exact={}
        )

    def sink(self, schedule: Schedule, padding: Padding, targets: Any) -> Collector:
        """A and B; A waits where targets are ignored, and no mask says which rows are real."""
        return Collector(
            schedule=schedule,
            settings=self.settings,
            padding=padding,
            memory=self.memory,
            hold=self.mask is None and self.likelihood.ignores(targets),
            keep_graph=bool(self.wanted),
        )

    def sums(self, sink: Collector, batch: Batch) -> Accumulated:
        """A, B and the exact blocks."""
        exact = sink.exact | self._without_taps(batch)
        for name, kind in self.settings.structures.items():
            if kind in EXACT and name not in exact:  # nothing uses it, or nothing comes back to it
                exact[name] = zero_moment(
                    self.settings.parameters[name], kind, batch.run.prediction.detach()
                )
        return Accumulated(
            batch.schedule, batch.run.n, batch.count, sink.inputs, sink.outputs, exact
        )

    def _without_taps(self, batch: Batch) -> dict[str, Tensor]:
        """Exact blocks of parameters that have no normal form."""
        if not batch.schedule.from_graph:
            return {}
        kinds = {name: self.settings.structures[name] for name in batch.schedule.from_graph}
        return gradient_moments(
            self.program, batch.run, self.state, batch.inputs, kinds, batch.vectors()
        )
