"""The sink of one batch: A is summed as inputs come along, B as gradients do.

An input is let go once A has it, and a gradient once B has it. Only what must wait is held: inputs
of exact blocks until their gradients are there, and all inputs where gradients say what is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fxkfac.curvature.images import Image, image_sums
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.perdatum import exact_moment
from fxkfac.curvature.plan import Scales
from fxkfac.curvature.receive import Awaited, Receiver
from fxkfac.curvature.sharing import (
    Kept,
    bias_output,
    counted_input,
    expanded_input,
    expanded_output,
    known,
    reduced_input,
    reduced_output,
)
from fxkfac.curvature.together import of_each
from fxkfac.graph.form import BatchAxis
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, detached, normal_y
from fxkfac.likelihoods.backpropagation import sends_back
from fxkfac.precision import accurate_dtype


@dataclass(kw_only=True)
class Collector(Receiver):
    """The sums of one batch; with `hold`, A waits for the gradients.

    Attributes:
        moment: In what sums are taken.
        inputs: For every term, what its A is made of; one object for terms with the same.
        outputs: For every term, Σ g gᵀ.
        exact: Exact blocks from the taps.
    """

    moment: type[Moment] = Moment
    inputs: list[InputSums] = field(init=False)
    outputs: list[Moment] = field(init=False)
    exact: dict[str, Tensor] = field(default_factory=dict)
    _held: dict[Use, Input] = field(default_factory=dict)
    _waiting: list[tuple[Use, Input, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = [InputSums(moment=self.moment) for _ in self.schedule.terms]
        if not self.hold:
            self.inputs = [self.inputs[k] for k in self.schedule.same_input]
        self.outputs = [self.moment() for _ in self.schedule.terms]
        self._means: Awaited[int, tuple[Tensor, Tensor, bool]] = Awaited()
        self._sums: Awaited[int, Tensor] = Awaited()
        self._gradients: Awaited[str, tuple[Use, Tensor]] = Awaited()

    def finish(self) -> None:
        """Sum what has waited until all vectors were sent back."""
        for use, x, y in self._waiting:
            self._add_input(use, x, y, self.rows_that_count(use, y))
        self._waiting.clear()
        super().finish()

    # --- A ---

    def take_input(self, use: Use, x: Input, y: Tensor) -> None:
        """Sum A, or keep the input for later."""
        if use in self.schedule.exact_of:
            self._held[use] = detached(x)
        if self.hold:
            self._waiting.append((use, detached(x), y.detach()))
        else:
            self._add_input(use, x, y, self._kept[use])

    def _add_input(self, use: Use, x: Input, y: Tensor, kept: Kept) -> None:
        for k, place in self.schedule.places.get(use, ()):
            term, sums = self.schedule.terms[k], self.inputs[k]
            if not self.hold and self.schedule.same_input[k] != k:
                continue
            if term.is_bias:
                self._add_ones(k, place, use, y)
            elif self.settings.sharing == "reduce":
                image = self._input_image(use, x, kept)
                by_datum = image is not None and use.batch == BatchAxis("n", 1, 1)
                sums_of_images = image_sums(image) if image and by_datum else None
                part = reduced_input(use, x, y, kept, term.scales[place], sums_of_images)
                self._add_means(k, self._means.add(k, (*part, kept is None), len(term.uses)))
            elif term.counts_only:
                counts, number = counted_input(use, x, y, kept)
                sums.merge(InputSums(counts=counts, rows=number))
            else:
                self._add_rows(sums, term.scales[place], use, x, y, kept)

    def _add_rows(
        self, sums: InputSums, scales: Scales, use: Use, x: Input, y: Tensor, kept: Kept
    ) -> None:
        image = self._input_image(use, x, kept)
        if image is None:
            rows, number = expanded_input(use, x, y, kept)
            sums.of(scales).add(rows, number)
        else:
            number = normal_y(use, y, None).shape[1:-1].numel()
            sums.of(scales).add_image(image, number)
        sums.rows = sums.rows + number

    def _input_image(self, use: Use, x: Input, kept: Kept) -> Image | None:
        images = self.schedule.inputs[use]
        if images is None or kept is not None or not isinstance(x, Tensor):
            return None
        return images.of_one(x)

    def _add_ones(self, k: int, place: int, use: Use, y: Tensor) -> None:
        """A bias by itself: a row for each datum, with the input one, so that A is their number."""
        if place == 0:
            n = normal_y(use, y, known(use)).shape[1]
            A = torch.full((1, 1, 1), float(n), dtype=accurate_dtype(y), device=y.device)
            self.inputs[k].of(()).merge(Moment.of(A))
            self.inputs[k].rows = n

    def _add_means(self, k: int, parts: list[tuple[Tensor, Tensor, bool]]) -> None:
        """x̂ = mean_s x over all uses of a term; the last of each says whether all rows count."""
        if not parts:
            return
        total, places = _sum([x for x, *_ in parts]), _sum([p for _, p, _ in parts])
        mean = total / places.clamp_min(1).unsqueeze(-1)
        self.inputs[k].of(()).add(mean)
        if any(whole for *_, whole in parts):
            self.inputs[k].rows = mean.shape[1]
        else:
            number = (places > 0).sum(-1)
            self.inputs[k].rows = int(number) if len(number) == 1 else number

    # --- B and exact blocks ---

    def take_gradient(self, use: Use, g: Tensor) -> None:
        """Sum B, and exact blocks."""
        if self.hold:
            self.padding.look(use, (g != 0).any(0))
        if sends_back(self.settings.fisher):
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
        elif kept is None and (images := self.schedule.outputs[use]):
            self.outputs[k].add_image(images.of(g))
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

    def finish_vectors(self) -> None:
        """Sum what is incomplete."""
        for k, sums in self._sums.rest():
            self._add_sums(k, sums)
        for name, gradients in self._gradients.rest():
            self._add_exact(name, gradients)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
