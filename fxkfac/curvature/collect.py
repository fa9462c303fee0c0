"""The sink of one batch: A is summed as inputs come along, B as gradients do.

An input is let go once A has it, and a gradient once B has it. Only what must wait is held: inputs
of exact blocks until their gradients are there, and all inputs where gradients say what is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fxkfac.curvature.backpropagation import has_several
from fxkfac.curvature.factors import Settings
from fxkfac.curvature.images import image_sums, input_image, output_image
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.perdatum import exact_moment
from fxkfac.curvature.plan import Scales
from fxkfac.curvature.schedule import Schedule, counts_only
from fxkfac.curvature.sharing import (
    Kept,
    accurate_dtype,
    bias_output,
    chosen_groups,
    counted_input,
    expanded_input,
    expanded_output,
    known,
    reduced_input,
    reduced_output,
    rows_kept,
)
from fxkfac.curvature.together import Listen, Unpack, chunks, goes_together, of_each, send_back
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Input, Routed, detached, normal_y

Key = TypeVar("Key")
Part = TypeVar("Part")


class Awaited(Generic[Key, Part]):
    """What several uses give together: complete when each has given its part."""

    def __init__(self) -> None:
        self._parts: dict[Key, list[Part]] = {}

    def add(self, key: Key, part: Part, expected: int) -> list[Part]:
        """Add one part; all of them when it is the last one, else none."""
        parts = self._parts.setdefault(key, [])
        parts.append(part)
        return self._parts.pop(key) if len(parts) == expected else []

    def rest(self) -> Iterator[tuple[Key, list[Part]]]:
        """What stays incomplete, since no gradient arrives at some uses."""
        while self._parts:
            yield self._parts.popitem()


@dataclass
class Collector:
    """The sums of one batch.

    Attributes:
        hold: Whether A waits for the gradients.
        keep_graph: Whether the graph is needed when all vectors have been sent back, for gradients
            of parameters.
        memory: Bytes that the gradients of vectors which go back together may take at all taps.
        inputs: For every term, what its A is made of; one object for terms with the same.
        outputs: For every term, Σ g gᵀ.
        exact: Exact blocks from the taps.
    """

    schedule: Schedule
    settings: Settings
    padding: Padding
    hold: bool
    keep_graph: bool
    memory: int
    inputs: list[InputSums] = field(init=False)
    outputs: list[Moment] = field(init=False)
    exact: dict[str, Tensor] = field(default_factory=dict)
    _root: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    _listens: bool = True
    _vectors: int = 1  # that are going back
    _bytes: int = 0  # of one vector's gradients
    _held: dict[Use, Input] = field(default_factory=dict)
    _waiting: list[tuple[Use, Input, Tensor]] = field(default_factory=list)
    _kept: dict[Use, Kept] = field(default_factory=dict)
    _groups: dict[Use, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = [InputSums() for _ in self.schedule.terms]
        if not self.hold:
            self.inputs = [self.inputs[k] for k in self.schedule.same_input]
        self.outputs = [Moment() for _ in self.schedule.terms]
        self._means: Awaited[int, tuple[Tensor, Tensor]] = Awaited()
        self._sums: Awaited[int, Tensor] = Awaited()
        self._gradients: Awaited[str, tuple[Use, Tensor]] = Awaited()

    # --- what the tapped graph hands over ---

    def output(self, place: int, y: Tensor) -> Tensor:
        """Make it a tap, and listen for its gradient."""
        self._bytes += y.nbytes
        tapped: Tensor = Listen.apply(self._root, y, partial(self._hear, place))
        return tapped

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Sum A, or keep the input for later."""
        with torch.no_grad():
            self._take_input(self.schedule.tapped.uses[use], detached(x), y.detach())

    # --- what the batch does with it ---

    def send_back(self, prediction: Tensor, vectors: Iterable[Tensor]) -> None:
        """Backpropagate vectors, some at a time, through the graph of the one forward pass."""
        if prediction.requires_grad:
            for part, is_last in chunks(vectors, self._at_once(prediction)):
                self._vectors = len(part)
                together = torch.stack(part) if len(part) > 1 else part[0].unsqueeze(0)
                send_back(prediction, self._root, together, self.keep_graph or not is_last)
                self._finish_vectors()
        self._listens = False
        self.finish()

    def gradients(self, arrived: dict[int, Tensor]) -> None:
        """In the place of backpropagation: what one vector's gradients are, at every tap."""
        with torch.no_grad():
            while arrived:  # each one is let go once B has it
                place, g = arrived.popitem()
                self._take_gradients(place, g.unsqueeze(0))
            self._finish_vectors()

    def finish(self) -> None:
        """Sum what has waited until all vectors were sent back."""
        for use, x, y in self._waiting:
            self._add_input(use, x, y, rows_kept(self.padding.real(use, y), self._groups.get(use)))
        self._waiting.clear()
        self.padding.require_fit()

    # --- A ---

    def _take_input(self, use: Use, x: Input, y: Tensor) -> None:
        if use in self.schedule.exact_of:
            self._held[use] = x
        if isinstance(x, Routed):
            self._groups[use] = chosen_groups(use, x, y)
        if self.hold:  # rows of padding have no gradient, and add nothing to B in any case
            self._kept[use] = self._groups.get(use)
            self._waiting.append((use, x, y))
            return
        self._kept[use] = rows_kept(self.padding.real(use, y), self._groups.get(use))
        self._add_input(use, x, y, self._kept[use])

    def _add_input(self, use: Use, x: Input, y: Tensor, kept: Kept) -> None:
        for k, place in self.schedule.places.get(use, ()):
            term, sums = self.schedule.terms[k], self.inputs[k]
            if not self.hold and self.schedule.same_input[k] != k:
                continue
            if term.is_bias:
                self._add_ones(k, place, use, y)
            elif self.settings.sharing == "reduce":
                sums_of_images = image_sums(use, x) if kept is None else None
                part = reduced_input(use, x, y, kept, term.scales(place), sums_of_images)
                self._add_means(k, self._means.add(k, part, len(term.uses)))
            elif counts_only(term):
                counts, number = counted_input(use, x, y, kept)
                sums.merge(InputSums(counts=counts, rows=number))
            else:
                self._add_rows(sums, term.scales(place), use, x, y, kept)

    def _add_rows(
        self, sums: InputSums, scales: Scales, use: Use, x: Input, y: Tensor, kept: Kept
    ) -> None:
        image = input_image(use, x) if kept is None else None
        if image is None:
            rows, number = expanded_input(use, x, y, kept)
            sums.of(scales).add(rows, number)
        else:
            number = normal_y(use, y, None).shape[1:-1].numel()
            sums.of(scales).add_image(image, number)
        sums.rows = sums.rows + number

    def _add_ones(self, k: int, place: int, use: Use, y: Tensor) -> None:
        """A bias by itself: one row for each datum, whose input is one."""
        if place == 0:
            n = normal_y(use, y, known(use)).shape[1]
            self.inputs[k].of(()).add(torch.ones(1, n, 1, dtype=accurate_dtype(y), device=y.device))
            self.inputs[k].rows = n

    def _add_means(self, k: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        """x̂ = mean_s x over all uses of a term."""
        if not parts:
            return
        total, places = _sum([x for x, _ in parts]), _sum([p for _, p in parts])
        mean = total / places.clamp_min(1).unsqueeze(-1)
        number = (places > 0).sum(-1)
        self.inputs[k].of(()).add(mean)
        self.inputs[k].rows = int(number) if len(number) == 1 else number

    # --- B and exact blocks ---

    def _at_once(self, prediction: Tensor) -> int:
        """How many vectors go back together."""
        size = self.memory // max(self._bytes, 1)
        if size < 2 or not has_several(self.settings.fisher, self.settings.mc_samples):
            return 1
        memo = self.schedule.tapped.memo
        key = ("together", prediction.device, prediction.dtype)  # kernels differ, and their rules
        if key not in memo:
            self._listens, self._vectors = False, 2
            memo[key] = goes_together(prediction, self._root)
            self._listens = True
        return size if memo[key] else 1

    def _hear(self, place: int, g: Tensor) -> None:
        if self._vectors > 1:
            Unpack.apply(g, partial(self._take_gradients, place), self._vectors)
        else:
            self._take_gradients(place, g.unsqueeze(0))

    def _take_gradients(self, place: int, g: Tensor) -> None:
        """Of all vectors that go back together, in the first axis."""
        if not self._listens:
            return
        for use in self.schedule.at_tap[place]:
            if self.hold:
                self.padding.look(use, (g != 0).any(0))
            for k, _ in self.schedule.places.get(use, ()):
                self._add_output(k, use, g)
            for name in self.schedule.exact_of.get(use, ()):
                uses = self.schedule.exact[name]
                self._add_exact(name, self._gradients.add(name, (use, g), len(uses)))

    def _add_output(self, k: int, use: Use, g: Tensor) -> None:
        term, kept = self.schedule.terms[k], self._kept[use]
        if term.is_bias:
            part = of_each(partial(bias_output, term, use), g)
            self._add_sums(k, self._sums.add(k, part, len(term.uses)))
        elif self.settings.sharing == "reduce":
            part = of_each(partial(reduced_output, use, kept=kept), g)
            self._add_sums(k, self._sums.add(k, part, len(term.uses)))
        elif (image := output_image(use, g) if kept is None else None) is not None:
            self.outputs[k].add_image(image)
        else:
            rows = of_each(partial(expanded_output, use, kept=kept), g)
            self.outputs[k].add(rows.flatten(1, 2) if rows.ndim > 4 else rows)

    def _add_sums(self, k: int, parts: list[Tensor]) -> None:
        """ĝ = Σ_s g over all uses of a term."""
        if parts:
            self.outputs[k].add(_sum(parts))

    def _add_exact(self, name: str, parts: list[tuple[Use, Tensor]]) -> None:
        if not parts:
            return
        for each in zip(*(g for _, g in parts), strict=True):
            gradients = dict(zip((use for use, _ in parts), each, strict=True))
            moment = exact_moment(
                name,
                self.settings.structures[name],
                self.settings.parameters[name],
                list(gradients),
                self._held.__getitem__,
                gradients.__getitem__,
            )
            self.exact[name] = self.exact[name] + moment if name in self.exact else moment

    def _finish_vectors(self) -> None:
        for k, sums in self._sums.rest():
            self._add_sums(k, sums)
        for name, gradients in self._gradients.rest():
            self._add_exact(name, gradients)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
