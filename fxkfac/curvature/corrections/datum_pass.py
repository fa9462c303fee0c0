"""A pass over the data that sums what is asked of every datum's own gradient, part by part.

Inputs are held until their gradients are there; the data's gradients are made, and let go, a chunk
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxkfac.curvature.batch import Batch, Pass
from fxkfac.curvature.corrections.overlap import Overlap, Place, summed_rows
from fxkfac.curvature.datum import Heard, require_independent, rows_of, sizes_of
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.plan import BlockPlan, TermPlan, require_same_terms
from fxkfac.curvature.receive import Awaited, Receiver
from fxkfac.curvature.schedule import Schedule
from fxkfac.curvature.sharing import known
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, detached
from fxkfac.isolation import are_finite
from fxkfac.linalg.contraction import Statistic
from fxkfac.linalg.orders import Order, Sizes, order_of_sums
from fxkfac.linalg.rows import Rows, room


def places(blocks: Mapping[str, BlockPlan]) -> Iterator[Place]:
    """Those of all terms, in the schedule's order."""
    return ((name, k) for name, plan in blocks.items() for k in range(len(plan.terms)))


@dataclass(frozen=True)
class Asked:
    """What is summed for one term.

    Attributes:
        statistic: Of its data's own gradients, which are those of all terms that lie over it.
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
        parts: Terms that lie over each other; each term is in one.
        totals: The sums.
        orders: How they were computed; none for a part at which no gradient has arrived.
    """

    asked: Mapping[Place, Asked]
    parts: Sequence[Overlap]
    totals: dict[Place, Tensor] = field(init=False)
    orders: dict[Place, Order] = field(default_factory=dict)
    _inputs: dict[Use, Input] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.totals = {place: a.start for place, a in self.asked.items()}
        self._awaited: Awaited[int, tuple[Place, Heard]] = Awaited()
        self._terms = dict(zip(places(by_name(self.schedule)), self.schedule.terms, strict=True))
        self._numbers = list(self._terms)
        self._part_of = {place: k for k, part in enumerate(self.parts) for place in part}

    def take_input(self, use: Use, x: Input, y: Tensor) -> None:
        """Keep the input. Raises `BatchAxisError` where it is not known whose a row is."""
        if use in self.schedule.places:
            known(use)
            self._inputs[use] = detached(x)

    def take_gradient(self, use: Use, g: Tensor) -> None:
        """Sum a part once all uses of all of its terms have theirs."""
        for k, which in self.schedule.places.get(use, ()):
            place = self._numbers[k]
            scales = self._terms[place].scales[which]
            heard = Heard(use, scales, self._inputs[use], g, self._kept[use])
            number = self._part_of[place]
            uses = sum(len(self._terms[p].uses) for p in self.parts[number])
            self._add(number, self._awaited.add(number, (place, heard), uses))

    def finish_vectors(self) -> None:
        """Sum parts that have no gradient at some of their uses."""
        for number, heard in self._awaited.rest():
            self._add(number, heard)

    def _add(self, number: int, heard: Sequence[tuple[Place, Heard]]) -> None:
        if not heard:
            return
        part, of_terms = self.parts[number], dict[Place, list[Heard]]()
        for place, one in heard:
            of_terms.setdefault(place, []).append(one)
        for rows in self._rows(part, of_terms):
            for place, own in summed_rows(part, rows).items():
                self.totals[place] = self.totals[place] + self.asked[place].statistic.of(own)

    def _rows(
        self, part: Overlap, of_terms: Mapping[Place, list[Heard]]
    ) -> Iterator[Mapping[Place, Rows]]:
        """Of some data and vectors at a time, for every term at which gradients have arrived."""
        at_once = []
        for place in part:
            group, d_in, d_out = self.asked[place].shape
            sizes = _sizes(self._terms[place], of_terms, place, d_in, d_out)
            statistic = self.asked[place].statistic
            order = statistic.order(sizes) if len(part) == 1 else order_of_sums(sizes)
            at_once.append(order.at_once(sizes, group, room(len(part))))
            self.orders[place] = order
        data, vectors = (min(sizes) for sizes in zip(*at_once, strict=True))
        each = [
            rows_of(
                self._terms[p],
                heard,
                data,
                vectors,
                self.asked[p].start.dtype,
                self.asked[p].statistic.tokens,
            )
            for p, heard in of_terms.items()
        ]
        for rows in zip(*each, strict=True):
            yield dict(zip(of_terms, rows, strict=True))


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
        if are_finite(self.totals.values()):
            return None
        wrong = [name for (name, _), t in self.totals.items() if not t.isfinite().all()]
        return f"the correction of {wrong[0]!r}" if wrong else None


@dataclass
class CorrectionPass(Pass[Corrector, TermSums]):
    """One pass.

    Attributes:
        blocks: The blocks of the factors that are corrected.
        parts: Their terms, those together that lie over each other.
        asked: For every term, what is summed.
    """

    blocks: Mapping[str, BlockPlan] = field(default_factory=dict)
    parts: Sequence[Overlap] = ()
    asked: Mapping[Place, Asked] = field(default_factory=dict)

    def sink(self, schedule: Schedule, padding: Padding, targets: Any) -> Corrector:
        """What is asked of each term.

        Nothing waits to know what is padding by ignored targets: such rows have no gradient.

        Raises:
            MergeError: The terms are not those of the factors.
            BatchAxisError: One datum's prediction depends on the others'.
        """
        require_same_terms(self.blocks.values(), schedule.blocks)
        require_independent(schedule.tapped)
        return Corrector(
            schedule=schedule,
            settings=self.settings,
            padding=padding,
            memory=self.memory,
            asked=self.asked,
            parts=self.parts,
        )

    def sums(self, sink: Corrector, batch: Batch) -> TermSums:
        """The sums of one batch."""
        return TermSums(batch.run.n, batch.count, sink.totals, sink.orders)


def by_name(schedule: Schedule) -> dict[str, BlockPlan]:
    """The blocks of a schedule, in its order."""
    return {block.name: block for block in schedule.blocks}


def _sizes(
    term: TermPlan, of_terms: Mapping[Place, list[Heard]], place: Place, d_in: int, d_out: int
) -> Sizes:
    """How long the axes of the rows of a term are; it has none where no gradient has arrived."""
    if place in of_terms:
        return sizes_of(term, of_terms[place], d_in, d_out)
    vectors = len(next(iter(of_terms.values()))[0].g)
    return Sizes(0, vectors, d_in, d_out)
