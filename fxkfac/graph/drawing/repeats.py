"""Drawn network -> the same with repeated layers drawn once, and with their count.

Requires: what `folded` returns. Result: a copy in which the first of several equal layers in a row
stands for all of them. Layers are equal if they have the same ops and parameters, up to numbers in
names, with the same edges inside, each makes of what the one before it handed over what it hands
to the next, and only the last one, or all alike, are read from outside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import networkx as nx

from fxkfac.graph.drawing.fold import common_path

MANY = 16  # of more layers only two at either end are tried to be left out
Layers = list[list[str]]  # for each of the equal layers, the keys of its ops in the same order


@dataclass(frozen=True)
class Repeat:
    """Equal layers in a row, of which the first is drawn.

    Attributes:
        count: How many there are.
        first, last: Paths of the modules (functions) around the first and the last one.
    """

    count: int
    first: tuple[str, ...]
    last: tuple[str, ...]

    @property
    def outside(self) -> tuple[str, ...]:
        """The path of what is around all of them."""
        return common_path([self.first, self.last])


def repeats_once(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """Draw repeated layers once.

    Args:
        network: What is drawn; its ops have a `path`, its parameters `names`, all `repeats`.

    Returns:
        A copy. Its attribute `repeats` maps a key to each `Repeat`; the nodes' attribute of that
        name says, from outside in, which they are in. Parameters have the `names` of all that
        they stand for.
    """
    network = network.copy()
    network.graph["repeats"] = {}
    while layers := _longest(network):
        _keep_first(network, layers)
    return network


def _longest(network: nx.MultiDiGraph) -> Layers:
    """The equal layers that save most nodes; empty where there are none."""
    place = {key: k for k, key in enumerate(network)}
    ordered = nx.lexicographical_topological_sort(network, key=place.__getitem__)
    order = [key for key in ordered if "op" in network.nodes[key]]
    numbers: dict[Hashable, int] = {}
    signs = [numbers.setdefault(_sign(network, key), len(numbers)) for key in order]
    paths = [network.nodes[key]["path"] for key in order]

    def gain(run: tuple[int, int, int]) -> tuple[int, int]:
        start, period, count = run
        depth = len(common_path(paths[start : start + period]))
        return (1 - count) * period, -depth  # most nodes, then the closest box

    for _, runs in groupby(sorted(_runs(signs), key=gain), key=gain):
        found = [
            [order[start + k * period :][:period] for k in range(count)]
            for start, period, count in runs
        ]
        if equal := [layers for layers in found if _are_equal(network, layers)]:
            return min(equal, key=lambda layers: _carried(network, layers))
    return []


def _carried(network: nx.MultiDiGraph, layers: Layers) -> int:
    """How many values one layer hands to the next: where layers are cut, it is fewest."""
    before, after = layers[:2]
    return len({u for u, v in network.edges(before) if u in before and v in after})


def _sign(network: nx.MultiDiGraph, key: str) -> Hashable:
    """What an op has in common with those of equal layers."""
    node = network.nodes[key]
    what = ["kind", "ops", "parametric", "shape", "x", "y", "batch", "group", "A", "B", "repeats"]
    own: list[Any] = [node.get(name) for name in what]
    own[-1] = [network.graph["repeats"][r].count for r in node["repeats"]]
    module = _pattern(node["module"]) if node["kind"] != "quiet" else ""
    entering = []
    for parameter, _, edge in network.in_edges(key, data=True):
        if edge["kind"] == "parameter":
            of = network.nodes[parameter]
            stored = [_pattern(of["name"]), of["shape"], of["status"], of["structure"]]
            used = [edge.get(name) for name in ("view", "orientation", "x", "A", "B")]
            entering.append((*stored, len(of["names"]), *used))
    return repr((own, module, entering))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _runs(signs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Where a stretch of signs comes again right after itself: (start, length, how often)."""
    for period in range(1, len(signs) // 2 + 1):
        start = 0
        for here in range(len(signs) - period + 1):
            if here < len(signs) - period and signs[here] == signs[here + period]:
                continue
            for phase in range(start, min(start + period, here - period + 1)):
                count = (here - phase) // period + 1
                yield from _parts(phase, period, count)
            start = here + 1


def _parts(start: int, period: int, count: int) -> Iterator[tuple[int, int, int]]:
    """A run, and what is left of it without its first or last layers, which may differ."""
    most = count - 2 if count <= MANY else 2
    for first in range(most + 1):
        for last in range(most + 1):
            if count - first - last > 1:
                yield start + first * period, period, count - first - last


def _are_equal(network: nx.MultiDiGraph, layers: Layers) -> bool:
    """Whether layers with equal signs also have equal edges."""
    place = {key: (k, j) for k, layer in enumerate(layers) for j, key in enumerate(layer)}
    entering = [_entering(network, place, layer) for layer in layers]
    first, second = entering[:2]
    alike = all(other == second for other in entering[2:])
    is_layer = any(network.nodes[key]["parametric"] for key in layers[0])
    return (
        is_layer
        and alike
        and _leads_through(second)
        and _enters_alike(first, second)
        and _read_alike(network, place, len(layers))
        and _nested(network, layers)
    )


def _entering(
    network: nx.MultiDiGraph, place: dict[str, tuple[int, int]], layer: list[str]
) -> Counter[tuple[Any, ...]]:
    """Every edge into a layer: to which op, from how many layers before, from where, gradient."""
    found: Counter[tuple[Any, ...]] = Counter()
    own = {key: f"own {k}" for k, key in enumerate(_own_parameters(network, layer))}
    for j, key in enumerate(layer):
        for source, _, edge in network.in_edges(key, data=True):
            at, gradient = place.get(source), edge.get("gradient", False)
            if at is None:
                found[j, None, own.get(source, source), gradient and source not in own] += 1
            else:
                found[j, place[key][0] - at[0], at[1], gradient] += 1
    return found


def _own_parameters(network: nx.MultiDiGraph, layer: list[str]) -> list[str]:
    """The parameters that only this layer reads, in the order in which it does."""
    before = dict.fromkeys(source for key in layer for source in network.predecessors(key))
    parameters = [key for key in before if network.nodes[key]["kind"] == "parameter"]
    return [key for key in parameters if set(network.successors(key)) <= set(layer)]


def _leads_through(layer: Counter[tuple[Any, ...]]) -> bool:
    """Whether all that is handed to the next layer comes from what the one before handed over."""
    inside = nx.DiGraph((u, v) for v, before, u, _ in layer if before == 0)
    carried = [(u, v) for v, before, u, _ in layer if before == 1]
    reached = {v for _, v in carried}
    reached |= {u for v in reached if v in inside for u in nx.descendants(inside, v)}
    return bool(carried) and {u for u, _ in carried} <= reached


def _enters_alike(first: Counter[tuple[Any, ...]], second: Counter[tuple[Any, ...]]) -> bool:
    """Whether the first layer reads from outside what the second one reads from the first."""
    carried = Counter(edge for edge in second.elements() if edge[1] == 1)
    entry = first - (second - carried)
    is_from_outside = all(edge[1] is None and edge[2][:4] != "own " for edge in entry)
    same = Counter(j for j, *_ in entry.elements()) == Counter(j for j, *_ in carried.elements())
    return is_from_outside and same and not second - carried - first and _is_step(second)


def _is_step(layer: Counter[tuple[Any, ...]]) -> bool:
    return all(before in (None, 0, 1) for _, before, *_ in layer)


def _read_alike(network: nx.MultiDiGraph, place: dict[str, tuple[int, int]], count: int) -> bool:
    """Whether what is outside reads only the last layer, or all of them alike."""
    readers: dict[tuple[str, int], set[int]] = {}
    for key, (k, j) in place.items():
        for reader in set(network.successors(key)) - set(place):
            readers.setdefault((reader, j), set()).add(k)
    return all(layers in ({count - 1}, set(range(count))) for layers in readers.values())


def _nested(network: nx.MultiDiGraph, layers: Layers) -> bool:
    """Whether every repeat that is there already is in one of the layers, or around all of them."""
    inside = [{r for key in layer for r in network.nodes[key]["repeats"]} for layer in layers]
    members: dict[str, set[str]] = {r: set() for found in inside for r in found}
    for key, node in network.nodes(data=True):
        for repeat in node["repeats"] if "op" in node else ():
            members.setdefault(repeat, set()).add(key)
    everything = {key for layer in layers for key in layer}
    return all(
        members[r] <= set(layer) or everything <= members[r]
        for layer, found in zip(layers, inside, strict=True)
        for r in found
    )


def _keep_first(network: nx.MultiDiGraph, layers: Layers) -> None:
    """Let the first layer stand for all."""
    ends = [
        common_path([network.nodes[key]["path"] for key in layer])
        for layer in (layers[0], layers[-1])
    ]
    repeat = f"repeat {len(network.graph['repeats'])}"
    network.graph["repeats"][repeat] = Repeat(len(layers), *ends)
    parameters = [_own_parameters(network, layer) for layer in layers]
    for group in zip(*parameters, strict=True):
        names = tuple(name for key in group for name in network.nodes[key]["names"])
        network.nodes[group[0]]["names"] = names
    around = common_path([network.nodes[key]["repeats"] for layer in layers for key in layer])
    for key in (*layers[0], *parameters[0]):
        node = network.nodes[key]
        node["repeats"] = (*around, repeat, *node["repeats"][len(around) :])
    _lead_on(network, layers)
    for layer, own in zip(layers[1:], parameters[1:], strict=True):
        network.remove_nodes_from([*layer, *own])


def _lead_on(network: nx.MultiDiGraph, layers: Layers) -> None:
    """Let what reads the last layer read the first one."""
    for key, last in zip(layers[0], layers[-1], strict=True):
        for _, reader, edge in list(network.out_edges(last, data=True)):
            if reader not in layers[-1] and not network.has_edge(key, reader):
                network.add_edge(key, reader, **edge)
