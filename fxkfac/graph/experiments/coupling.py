"""Tapped graph -> whether one datum's prediction depends on the others', by experiment.

Change one datum: do the others' predictions change? It is changed in two ways. Another datum is put
in its place; and the outputs of its ops are changed at the taps, which is possible where the data
are whole numbers, all alike, and no others are known to be valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.fx import Graph, Node

from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.dependence import depend_on
from fxkfac.graph.experiments.locate import Layout, close, data_of
from fxkfac.graph.signature import near
from fxkfac.graph.tap import Sink, tap_nodes
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input


@dataclass(frozen=True)
class Coupling:
    """What the experiment found.

    Attributes:
        coupled: Whether one datum's prediction depends on the others'.
        known: Whether that is known: not so where no way of changing a datum changed anything.
    """

    coupled: bool
    known: bool = True


@dataclass(frozen=True)
class _Changed:
    """A sink that changes the rows of the first datum.

    Attributes:
        layouts: Where the data are in the outputs of taps, by place.
        n: Number of data.
        generator: For what they become.
        places: Where there were such rows.
    """

    layouts: Mapping[int, Layout]
    n: int
    generator: Generator
    places: set[int] = field(default_factory=set)

    def output(self, place: int, y: Tensor) -> Tensor:
        """The output, with other rows of the first datum."""
        at = self.layouts.get(place)
        if at is None or y.shape[at[0]] != at[1] * self.n * at[2]:  # it is the same for all data
            return y
        self.places.add(place)
        is_first = data_of(y, at, self.n) == 0
        return torch.where(is_first, near(y, self.generator), y)

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Nothing is kept."""


def coupling(
    run: Callable[[list[Tensor], Sink], Tensor],
    graph: Graph,
    data: list[Tensor],
    replaced: list[Tensor],
    n: int,
    at: Layout,
    uses: Sequence[Use],
    generator: Generator,
    lowest: torch.dtype,
) -> Coupling:
    """Change the first datum, and compare the predictions.

    Args:
        run: The tapped graph.
        graph: The same, to be read.
        data: The data.
        replaced: The same with another one in the place of the first.
        n: How many they are.
        at: The layout of the prediction.
        uses: The uses, tapped, with their batch axes.
        generator: For what the first datum's rows become.
        lowest: The dtype with the fewest digits of what the graph computes.
    """
    if n < 2:
        return Coupling(coupled=False)
    as_it_is, changed = (_Changed(layouts, n, generator) for layouts in ({}, _layouts(uses)))
    f, other_f = run(data, as_it_is), run(replaced, as_it_is)
    before = _Split.of(f, at, n)
    # Where values say how many rows a datum has, another one may have more.
    by_other = _Split.of(other_f, at, n) if other_f.shape == f.shape else None
    if by_other is not None and before.couples(by_other, lowest):
        return Coupling(coupled=True)
    by_taps = _Split.of(run(data, changed), at, n)
    if before.couples(by_taps, lowest):
        return Coupling(coupled=True)
    if by_other is not None and before.differs(by_other):
        return Coupling(coupled=False)
    seen = before.differs(by_taps) and not _is_around(graph, changed.places, len(data))
    return Coupling(coupled=False, known=seen)


@dataclass(frozen=True)
class _Split:
    """A prediction: the part of the first datum, and that of the others."""

    first: Tensor
    others: Tensor

    @classmethod
    def of(cls, prediction: Tensor, at: Layout, n: int) -> _Split:
        axis, outer, inner = at
        parts = prediction.unflatten(axis, (outer, n, inner))
        return cls(parts.narrow(axis + 1, 0, 1), parts.narrow(axis + 1, 1, n - 1))

    def couples(self, changed: _Split, lowest: torch.dtype) -> bool:
        return not close(self.others, changed.others, lowest)

    def differs(self, changed: _Split) -> bool:
        return not torch.equal(self.first, changed.first)


def _layouts(uses: Sequence[Use]) -> dict[int, Layout]:
    """Where the data are in the outputs of taps, by place, as far as known."""
    found = {}
    for use in uses:
        axes = axis_tokens(use.form.y)
        if use.batch is None or use.batch.axis not in axes:
            continue
        axis = axes.index(use.batch.axis)
        found[use.tap] = (axis, use.batch.outer, use.batch.inner)
    return found


def _is_around(graph: Graph, places: Collection[int], inputs: int) -> bool:
    """Whether floating point numbers are made of the data before they come to one of these taps.

    What was made of them there is not known, since nothing changed it.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"][-inputs:]
    taps = [node for place, node in tap_nodes(graph).items() if place in places]
    behind = depend_on(graph, placeholders, taps) - set(placeholders)
    ops = {n for tap in taps for n in tap.all_input_nodes}
    return any(_is_floating(n) for n in behind - ops)


def _is_floating(node: Node) -> bool:
    """Whether a value is of such numbers, as far as known."""
    if node.op == "output":
        return True
    value = node.meta.get("val")
    is_known = value is not None or not node.users  # the taps themselves hand nothing on
    return not is_known or (isinstance(value, Tensor) and value.is_floating_point())
