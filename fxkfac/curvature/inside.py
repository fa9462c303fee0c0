"""Sums of A and B inside of compiled code, so that a batch is two calls and nothing between them.

A collector is recorded with the graph that it listens to; the compiled code then returns, for every
term, Σ x̃ x̃ᵀ with the prediction, and Σ g gᵀ with each vector that is sent back. On a GPU, where
calls are what takes time, and for narrow layers; wide ones are faster on a CPU with the products
outside, one triangle of each, added in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.moments import InputSums, Moment
from fxkfac.curvature.padding import Padding
from fxkfac.curvature.plan import Scales
from fxkfac.curvature.receive import Receiver
from fxkfac.curvature.schedule import counts_only
from fxkfac.linalg import strip

Key = TypeVar("Key")
Rows = Mapping[int, int | Tensor]  # of every term


def pays(sink: Receiver, device: torch.device) -> TypeGuard[Collector]:
    """Whether compiled code can and should have the sums inside.

    It cannot where only values say which rows count: under a mask, where targets are ignored, and
    where every row chooses a group.
    """
    if not isinstance(sink, Collector) or sink.hold or sink.padding.mask is not None:
        return False
    schedule = sink.schedule
    if any(use.form.routes is not None for use in schedule.heard):
        return False
    return device.type != "cpu" or strip(schedule.widest) == schedule.widest


def alike(sink: Collector) -> Collector:
    """An empty sink with the same schedule, for one vector at a time."""
    return Collector(
        schedule=sink.schedule, settings=sink.settings, padding=Padding(), memory=0, keep_graph=True
    )


@dataclass(frozen=True)
class Summed:
    """The sums of a batch.

    Attributes:
        inputs: Σ x̃ x̃ᵀ of every term that has an A of its own; counts where rows are one-hot.
        gradients: Σ g gᵀ of every term at which gradients arrive; and exact blocks, by name.
        rows: The number of rows that A has.
    """

    inputs: Mapping[int, Tensor]
    gradients: Mapping[int | str, Tensor]
    rows: Rows

    @staticmethod
    def of(sink: Collector) -> Summed:
        """What a sink has when all vectors have been sent back; it is used up."""
        own = [k for k, first in enumerate(sink.schedule.same_input) if k == first]
        outputs = {k: moment.matrix() for k, moment in enumerate(sink.outputs)}
        return Summed(
            {k: sink.inputs[k].matrix() for k in own},
            {k: B for k, B in outputs.items() if B is not None} | sink.exact,
            {k: sink.inputs[k].rows for k in own},
        )


def take_inputs(
    sink: Collector, inputs: Mapping[int, Tensor], rows: Rows, copy: bool = False
) -> None:
    """Add what compiled code has summed with the prediction; with `copy`, it keeps its own."""
    for k, A in _each_its_own(inputs, copy).items():
        counts = counts_only(sink.schedule.terms[k])
        moments: dict[Scales, Moment] = {} if counts else {(): Moment.of(A)}
        sink.inputs[k].merge(InputSums(moments, A if counts else None, rows[k]))


def take_gradients(
    sink: Collector, gradients: Mapping[int | str, Tensor], copy: bool = False
) -> None:
    """Add what it has summed with a vector that was sent back."""
    for key, total in _each_its_own(gradients, copy).items():
        if isinstance(key, int):
            sink.outputs[key].merge(Moment.of(total))
        else:
            sink.exact[key] = sink.exact[key] + total if key in sink.exact else total


def _each_its_own(sums: Mapping[Key, Tensor], copy: bool) -> dict[Key, Tensor]:
    """Of equal sums a compiler may make one tensor; but each will be changed in place."""
    first: dict[int, Key] = {}
    return {
        key: total.clone() if copy or first.setdefault(total.data_ptr(), key) != key else total
        for key, total in sums.items()
    }
