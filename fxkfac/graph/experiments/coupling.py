"""Tapped graph -> whether one datum's prediction depends on the others', by experiment.

Change some data: do the predictions of the rest change? They are changed in two ways at once.
Others are put in their places; and the outputs of their ops are changed at the taps, which is
possible where the data are whole numbers, all alike, and no others are known to be valid.

Which datum the others depend on may hang on values, as that of the largest, or on its place. So
the sets of changed data are such that of any two each is once changed while the other is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from math import comb

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
    """A sink that changes the rows of some data.

    Attributes:
        layouts: Where the data are in the outputs of taps, by place.
        chosen: For every datum, whether it is one of them.
        generator: For what they become.
        places: Where there were such rows.
    """

    layouts: Mapping[int, Layout]
    chosen: Tensor
    generator: Generator
    places: set[int] = field(default_factory=set)

    def output(self, place: int, y: Tensor) -> Tensor:
        """The output, with other rows of these data."""
        at, n = self.layouts.get(place), len(self.chosen)
        if at is None or y.shape[at[0]] != at[1] * n * at[2]:  # it is the same for all data
            return y
        self.places.add(place)
        return torch.where(_entries_of(self.chosen, y, at), _near(y, at, n, self.generator), y)

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Nothing is kept."""


def coupling(
    run: Callable[[list[Tensor], Sink], Tensor],
    graph: Graph,
    data: list[Tensor],
    replaced: Callable[[list[Tensor], Tensor], list[Tensor]],
    n: int,
    at: Layout,
    uses: Sequence[Use],
    generator: Generator,
    lowest: torch.dtype,
) -> Coupling:
    """Change some data, and compare the predictions of the others.

    Args:
        run: The tapped graph.
        graph: The same, to be read.
        data: The data.
        replaced: Puts others in the places of those that are chosen.
        n: How many they are.
        at: The layout of the prediction.
        uses: The uses, tapped, with their batch axes.
        generator: For what the rows of changed data become.
        lowest: The dtype with the fewest digits of what the graph computes.
    """
    if n < 2:
        return Coupling(coupled=False)
    every = torch.ones(n, dtype=torch.bool, device="cpu")
    as_it_is, layouts = _Changed({}, every, generator), _layouts(uses)
    f = run(data, as_it_is)
    for chosen in separating_sets(n):
        sink = _Changed(layouts, chosen, generator)
        changed = run(replaced(data, chosen), sink)
        # Where values say how many rows a datum has, another one may have more.
        if changed.shape != f.shape:
            changed = run(data, sink)
        rest = _entries_of(~chosen, f, at)
        if not close(torch.where(rest, f, 0), torch.where(rest, changed, 0), lowest):
            return Coupling(coupled=True)
    if _differ(f, run(replaced(data, every), as_it_is)):
        return Coupling(coupled=False)
    sink = _Changed(layouts, every, generator)
    seen = _differ(f, run(data, sink)) and not _is_around(graph, sink.places, len(data))
    return Coupling(coupled=False, known=seen)


def separating_sets(n: int) -> Iterator[Tensor]:
    """As few sets of n data as tell any two of them apart, in both directions.

    A datum is in half of the sets, and no two are in the same ones.
    """
    number = next(k for k in range(2, n + 1) if comb(k, k // 2) >= n)
    held_by = list(islice(combinations(range(number), number // 2), n))
    for k in range(number):
        yield torch.tensor([k in sets for sets in held_by], device="cpu")


def _near(y: Tensor, at: Layout, n: int, generator: Generator) -> Tensor:
    """Rows near those given, of all data by the same factors: to draw each one's takes long."""
    axis, outer, inner = at
    parts = y.unflatten(axis, (outer, n, inner))
    drawn = (*parts.shape[: axis + 1], 1, *parts.shape[axis + 2 :])
    return near(parts, generator, drawn).flatten(axis, axis + 2)


def _entries_of(chosen: Tensor, t: Tensor, at: Layout) -> Tensor:
    """Which entries of a tensor belong to the chosen data; broadcasts to it."""
    return chosen.to(t.device)[data_of(t, at, len(chosen))]


def _differ(f: Tensor, other: Tensor) -> bool:
    return f.shape == other.shape and not torch.equal(f, other)


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
