"""A pass over the data that sums what is asked of every datum's own gradient, term by term.

Inputs are held until their gradients are there; the data's gradients are made, and let go, a chunk
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature import perdatum
from fxkfac.curvature.batch import Batch, Pass
from fxkfac.curvature.datum import Heard, require_independent, rows_of, sizes_of
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.plan import BlockPlan, require_same_terms
from fxkfac.curvature.receive import Awaited, Receiver
from fxkfac.curvature.schedule import Schedule
from fxkfac.curvature.sharing import known
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Input
from fxkfac.linalg.contraction import Statistic
from fxkfac.linalg.orders import Order

Place = tuple[str, int]  # the name of a block, and which of its terms


def places(blocks: Mapping[str, BlockPlan]) -> Iterator[Place]:
    """Those of all terms, in the schedule's order."""
    return ((name, k) for name, plan in blocks.items() for k in range(len(plan.terms)))


@dataclass(frozen=True)
class Asked:
    """What is summed for one term.

    Attributes:
        statistic: Of its data's own gradients.
        shape: Theirs, (group, in, out).
        start: Zeros, where the sum begins.
    """

    statistic: Statistic
    shape: tuple[int, int, int]
    start: Tensor


@dataclass(kw_only=True)
class Corrector(Receiver):
    """The sink of one batch.

    Attributes:
        asked: For every term.
        totals: The sums.
        orders: How they were computed; none for a term at which no gradient has arrived.
    """

    asked: list[Asked]
    totals: list[Tensor] = field(init=False)
    orders: dict[int, Order] = field(default_factory=dict)
    _inputs: dict[Use, Input] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.totals = [a.start for a in self.asked]
        self._awaited: Awaited[int, Heard] = Awaited()

    def take_input(self, use: Use, x: Input, y: Tensor) -> None:
        """Keep the input. Raises `BatchAxisError` where it is not known whose a row is."""
        if use in self.schedule.places:
            known(use)
            self._inputs[use] = x

    def take_gradient(self, use: Use, g: Tensor) -> None:
        """Sum a term once all of its uses have theirs."""
        for k, place in self.schedule.places.get(use, ()):
            term = self.schedule.terms[k]
            heard = Heard(use, term.scales(place), self._inputs[use], g, self._kept[use])
            self._add(k, self._awaited.add(k, heard, len(term.uses)))

    def finish_vectors(self) -> None:
        """Sum terms that have no gradient at some of their uses."""
        for k, heard in self._awaited.rest():
            self._add(k, heard)

    def _add(self, k: int, heard: list[Heard]) -> None:
        if not heard:
            return
        term, asked = self.schedule.terms[k], self.asked[k]
        group, d_in, d_out = asked.shape
        sizes = sizes_of(term, heard, d_in, d_out)
        self.orders[k] = order = asked.statistic.order(sizes)
        data, vectors = order.at_once(sizes, group, perdatum.LARGEST_CHUNK)
        for rows in rows_of(term, heard, data, vectors, asked.start.dtype):
            self.totals[k] = self.totals[k] + asked.statistic.of(rows)


@dataclass
class TermSums:
    """The sums of some data.

    Attributes:
        n: Number of data.
        count: What `reduction="mean"` divides by.
        totals: For every term.
        orders: How they were computed, in the first batch.
    """

    n: int
    count: float
    totals: dict[Place, Tensor]
    orders: dict[Place, Order]

    def merge(self, other: TermSums) -> None:
        """Add the sums of further data, which are used up."""
        self.n += other.n
        self.count += other.count
        self.orders = other.orders | self.orders
        for place, total in other.totals.items():
            self.totals[place] = self.totals[place] + total

    def require_same_terms(self, other: TermSums) -> None:
        """Each batch's terms are those of the factors, as the sink has seen."""

    def not_finite(self) -> str | None:
        """What holds NaN or Inf, if anything does."""
        if not self.totals or torch.nn.utils.get_total_norm(self.totals.values()).isfinite():
            return None
        wrong = [name for (name, _), t in self.totals.items() if not t.isfinite().all()]
        return f"the correction of {wrong[0]!r}" if wrong else None


@dataclass
class CorrectionPass(Pass[Corrector, TermSums]):
    """One pass.

    Attributes:
        blocks: The blocks of the factors that are corrected.
        asked: For every term, what is summed.
    """

    blocks: Mapping[str, BlockPlan] = field(default_factory=dict)
    asked: Mapping[Place, Asked] = field(default_factory=dict)

    def sink(self, schedule: Schedule, padding: Padding, memory: int, targets: Any) -> Corrector:
        """What is asked of each term.

        Nothing waits to know what is padding by ignored targets: such rows have no gradient.

        Raises:
            MergeError: The terms are not those of the factors.
            BatchAxisError: One datum's prediction depends on the others'.
        """
        require_same_terms(self.blocks.values(), schedule.blocks)
        require_independent(schedule.tapped)
        asked = [self.asked[place] for place in places(_by_name(schedule))]
        return Corrector(
            schedule=schedule, settings=self.settings, padding=padding, memory=memory, asked=asked
        )

    def sums(self, sink: Corrector, batch: Batch) -> TermSums:
        """The sums of one batch."""
        at = list(places(_by_name(batch.schedule)))
        orders = {at[k]: order for k, order in sink.orders.items()}
        totals = dict(zip(at, sink.totals, strict=True))
        return TermSums(batch.run.n, batch.count, totals, orders)


def _by_name(schedule: Schedule) -> dict[str, BlockPlan]:
    return {block.name: block for block in schedule.blocks}
