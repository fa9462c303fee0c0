"""Sums of A and B inside of compiled code, which then lets inputs go as soon as it has summed them.

A collector is recorded with the graph that it listens to, and the code returns what its sums are
made of. On a GPU, where calls are what takes time, and for narrow layers, these are matrices, and
their products are compiled like all else. For wide layers on a CPU each product is one opaque
operation, by a kernel that takes one triangle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.images import Image
from fxkfac.curvature.inductor.code import Values
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.plan import Scales
from fxkfac.curvature.receive import Receiver
from fxkfac.curvature.schedule import Schedule
from fxkfac.linalg import Gram, in_front, opaque_gram, opaque_patch_gram, strip

Own = Callable[[Tensor], Tensor]  # a tensor that may be changed, with the same numbers
Named = Any  # a tensor of the recorded graph, and in its code the name of that


def is_fixed(sink: Receiver) -> TypeGuard[Collector]:
    """Whether compiled code can have the sums inside.

    It cannot where only values say which rows count: under a mask, where targets are ignored, and
    where every row chooses a group.
    """
    if not isinstance(sink, Collector) or sink.hold or sink.padding.mask is not None:
        return False
    return not any(use.form.routes is not None for use in sink.schedule.heard)


def is_open(schedule: Schedule, device: torch.device) -> bool:
    """Whether products are best compiled like all else."""
    return device.type != "cpu" or strip(schedule.widest) == schedule.widest


class Piece(NamedTuple):
    """What a moment is made of, where compiled code has summed it.

    Attributes:
        total, sums, waiting, scales: As of `Moment`; the total is a whole matrix.
        scale: What that is multiplied by.
        number: Its `count`.
    """

    total: Named | None
    scale: float = 1.0
    sums: Named | None = None
    waiting: tuple[Named, ...] = ()
    scales: Scales = ()
    number: int | Named = 0

    def moment(self, values: Values, own: Own) -> Moment:
        """The moment of what the code gave, which uses up the tensors that it owns."""
        total, gram = None, None
        if self.total is not None:
            total = own(values[self.total])
            gram = Gram(in_front(total, len(self.scales)), is_empty=False, scale=self.scale)
        sums = None if self.sums is None else own(values[self.sums])
        waiting = [own(values[name]) for name in self.waiting]
        return Moment(self.scales, total, gram, sums, _number(values, self.number), waiting)


def _number(values: Values, number: int | Named) -> int | Tensor:
    return number if isinstance(number, int) else values[number]


class Open(Moment):
    """In a recorded graph: its products are operations like all others, and it is a matrix."""

    def piece(self) -> Piece | None:
        """The matrix, if there is one."""
        total = self.matrix()
        return None if total is None else Piece(total)


class Opaque(Moment):
    """In a recorded graph: each of its products is one operation, which compiled code calls."""

    def add_products(self, x: Tensor) -> Tensor | None:
        """Add Σ x xᵀ of rows in one axis or in two; return Σ x, if there is a rest."""
        scale = self._keep(x.shape[1:-1].numel())
        total, sums = opaque_gram(x, len(self.scales), scale)
        self._take(total, scale)
        return sums

    def add_patch_products(self, of: Image, likely: int) -> None:
        """Add that of an image's patches, which will be over so many, as is likely."""
        scale = self._keep(likely)
        self._take(opaque_patch_gram(of.image, of.windows, len(self.scales), scale), scale)

    def _keep(self, rows: int) -> float:
        """The scale of all sums, as the first one has it."""
        self.scale = self.likely_scale(rows)
        return self.scale

    def _take(self, total: Tensor, scale: float) -> None:
        self.total = total if self.total is None else self.total + total
        self.gram = Gram(in_front(self.total, len(self.scales)), is_empty=False, scale=scale)

    def piece(self) -> Piece | None:
        """The sum as it is and the rows that wait, if there are any."""
        if self.total is None and not self.waiting:
            return None
        waiting, scale = tuple(self.waiting), 1.0 if self.gram is None else self.gram.scale
        return Piece(self.total, scale, self.sums, waiting, self.scales, self.count)


def recording(sink: Collector, device: torch.device, R: float = 1.0) -> Collector:
    """An empty sink with the same schedule, for one vector, in a graph that is recorded.

    Sums that are opaque are multiplied by what makes factors of them, A by R, if these data are
    all: the kernel does that on its way, and what is left to do else takes a pass over the sum.
    """
    recorded = Collector(
        schedule=sink.schedule,
        settings=sink.settings,
        padding=Padding(),
        memory=0,
        keep_graph=True,
        moment=Open if is_open(sink.schedule, device) else Opaque,
    )
    if recorded.moment is Opaque:
        for sums in recorded.inputs:
            sums.moment = partial(Opaque, scale=R or 1.0)
    return recorded


class InputPieces(NamedTuple):
    """What is summed with the prediction, for every term that has an A of its own.

    Attributes:
        moments: What A is made of.
        counts: In the place of moments, how often each one-hot row occurs.
        rows: Number of rows.
    """

    moments: dict[int, list[Piece]]
    counts: dict[int, Named]
    rows: dict[int, int | Named]

    @staticmethod
    def of(sink: Collector) -> InputPieces:
        """Those of a recorded sink."""
        own = {k: s for k, s in enumerate(sink.inputs) if sink.schedule.same_input[k] == k}
        return InputPieces(
            {k: _pieces(s.moments.values()) for k, s in own.items()},
            {k: s.counts for k, s in own.items() if s.counts is not None},
            {k: s.rows for k, s in own.items()},
        )

    def give(self, values: Values, sink: Collector) -> None:
        """Add to a sink what the code gave by these names."""
        own = _each_its_own()
        for k, rows in self.rows.items():
            sums = sink.inputs[k]
            for piece in self.moments[k]:
                sums.of(piece.scales).merge(piece.moment(values, own))
            counts = own(values[self.counts[k]]) if k in self.counts else None
            sums.merge(InputSums(counts=counts, rows=_number(values, rows)))


class GradientPieces(NamedTuple):
    """What is summed with a vector that is sent back.

    Attributes:
        moments: What Σ g gᵀ of every term is made of.
        exact: Exact blocks.
    """

    moments: dict[int, list[Piece]]
    exact: dict[str, Named]

    @staticmethod
    def of(sink: Collector) -> GradientPieces:
        """Those of a recorded sink."""
        return GradientPieces(
            {k: _pieces([moment]) for k, moment in enumerate(sink.outputs)}, sink.exact
        )

    def give(self, values: Values, sink: Collector) -> None:
        """Add to a sink what the code gave by these names."""
        own = _each_its_own()
        for k, pieces in self.moments.items():
            for piece in pieces:
                sink.outputs[k].merge(piece.moment(values, own))
        for name, place in self.exact.items():
            block = values[place]
            sink.exact[name] = sink.exact[name] + block if name in sink.exact else own(block)


def _pieces(moments: Iterable[Moment]) -> list[Piece]:
    """What the code returns of these."""
    found = [m.piece() for m in moments if isinstance(m, Open | Opaque)]
    return [piece for piece in found if piece is not None]


def _each_its_own() -> Own:
    """Of equal sums a compiler may make one tensor; but each will be changed in place."""
    seen: set[int] = set()

    def own(t: Tensor) -> Tensor:
        if t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            return t
        return t.clone()

    return own
