"""Answers from a program's network: what lies below what, and what is no longer needed.

Input: the network that `program.to_networkx()` returns. Down is the way of the backpropagated
vectors, from the prediction to the input; so what feeds an op lies below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fxkfac.errors import OptionError
from fxkfac.functional import unknown


@dataclass(frozen=True)
class Saved:
    """What is no longer needed once some parameters are frozen.

    Attributes:
        taps: The taps that vanish, by their number.
        ops: Keys of the ops through which vectors are no longer sent back.
        factors: Parameter, A and B (their sizes) of every use whose factors are no longer summed.
    """

    taps: tuple[int, ...]
    ops: tuple[str, ...]
    factors: tuple[tuple[str, str, str], ...]


def taps_below(network: nx.MultiDiGraph, parameter: str) -> list[int]:
    """The taps that lie below a parameter: vectors pass the op that it enters on their way there.

    Args:
        network: What `program.to_networkx()` returned.
        parameter: Its name. One that is used in several places has below it what is below any of
            them, among it the taps of its own lower uses.

    Returns:
        Numbers of taps, ascending. Those of the op that the parameter enters are not below it.

    Raises:
        UnknownParameter: No parameter has this name.
        OptionError: The network is something else.
    """
    _require_network(network)
    flow = nx.DiGraph(_sent_back(network))
    places = {_place(network, v, edge) for _, v, edge in _uses(network, parameter)}
    below = {key for place in places if place in flow for key in nx.ancestors(flow, place)}
    return sorted(tap for tap, key in _taps(network).items() if key in below)


def longest_path(network: nx.MultiDiGraph) -> list[str]:
    """The way to the prediction that leads through most tapped ops.

    An op that adds a bias which shares another one's factors does not count. Of several such ways
    it is one with most ops in all.

    Args:
        network: What `program.to_networkx()` returned.

    Returns:
        Keys of its nodes, from where it begins (an input, or a constant) to the prediction.

    Raises:
        OptionError: The network is something else.
    """
    _require_network(network)
    flow = _flow(network)
    (prediction,) = (key for key, kind in network.nodes(data="kind") if kind == "prediction")
    flow = flow.subgraph(nx.ancestors(flow, prediction) | {prediction})
    many = len(flow) + 1
    weighted = nx.DiGraph()
    weighted.add_nodes_from(flow)
    for u, v in flow.edges:
        node = network.nodes[v]
        is_layer = node["kind"] == "op" and not node["joins"]
        weighted.add_edge(u, v, weight=1 + many * is_layer)
    return list(nx.dag_longest_path(weighted))


def sharing_inputs(network: nx.MultiDiGraph) -> list[tuple[str, ...]]:
    """The weights that enter ops with the same input, as query, key and value do.

    Experts share one where they also have the same choice of rows.

    Args:
        network: What `program.to_networkx()` returned.

    Returns:
        Names of the parameters that share an input, two or more in each group, in the order of the
        graph. Biases are in none: their input is the constant one.

    Raises:
        OptionError: The network is something else.
    """
    _require_network(network)
    groups: dict[str, dict[str, None]] = {}
    for u, _, edge in network.edges(data=True):
        if edge["kind"] == "parameter" and edge.get("input") and "A" in edge:
            groups.setdefault(edge["input"], {})[network.nodes[u]["name"]] = None
    return [tuple(names) for names in groups.values() if len(names) > 1]


def saved_by_freezing(network: nx.MultiDiGraph, parameters: str | Iterable[str]) -> Saved:
    """What is no longer needed once parameters are frozen (their curvature is not asked for).

    Args:
        network: What `program.to_networkx()` returned.
        parameters: Their names; of a layer usually all.

    Raises:
        UnknownParameter: No parameter has one of these names.
        OptionError: The network is something else.
    """
    _require_network(network)
    frozen = {parameters} if isinstance(parameters, str) else set(parameters)
    for name in frozen:
        _key(network, name)
    known = {node["name"] for _, node in network.nodes(data=True) if node["kind"] == "parameter"}
    before, after = _taps(network), _taps(network, known - frozen)
    passed = _passed(network, before.values()) - _passed(network, after.values())
    summed = [(network.nodes[u].get("name"), e) for u, _, e in network.edges(data=True) if "A" in e]
    return Saved(
        tuple(sorted(before.keys() - after.keys())),
        tuple(key for key in network if key in passed),
        tuple((name, e["A"], e["B"]) for name, e in summed if name in frozen),
    )


def _require_network(network: Any) -> None:
    """A program is easily passed in its place."""
    if not isinstance(network, nx.MultiDiGraph):
        raise OptionError(
            f"network is of type {type(network).__name__}; expected what program.to_networkx() "
            "returns."
        )


def _flow(network: nx.MultiDiGraph) -> nx.DiGraph:
    """Everything but parameters, with the edges along which data go."""
    flow = nx.DiGraph()
    flow.add_nodes_from(key for key, kind in network.nodes(data="kind") if kind != "parameter")
    flow.add_edges_from((u, v) for u, v, kind in network.edges(data="kind") if kind == "data")
    return flow


def _key(network: nx.MultiDiGraph, parameter: str) -> str:
    nodes = network.nodes(data=True)
    keys = {node["name"]: key for key, node in nodes if node["kind"] == "parameter"}
    if parameter not in keys:
        raise unknown(parameter, keys)
    return keys[parameter]


def _uses(network: nx.MultiDiGraph, parameter: str) -> list[tuple[str, str, dict[str, Any]]]:
    return list(network.out_edges(_key(network, parameter), data=True))


def _place(network: nx.MultiDiGraph, op: str, edge: Mapping[str, Any]) -> str:
    """Where a use is tapped: at the op, or where its output meets the data."""
    tapped = edge.get("tapped", op)
    return tapped if tapped in network else op


def _taps(network: nx.MultiDiGraph, parameters: set[str] | None = None) -> dict[int, str]:
    """The node of every tap; only of those with a use of the parameters, where these are given."""
    return {
        edge["tap"]: _place(network, v, edge)
        for u, v, edge in network.edges(data=True)
        if "tap" in edge and (parameters is None or network.nodes[u].get("name") in parameters)
    }


def _sent_back(network: nx.MultiDiGraph) -> list[tuple[str, str]]:
    """The edges through which backpropagated vectors pass."""
    return [(u, v) for u, v, passes in network.edges(data="gradient") if passes]


def _passed(network: nx.MultiDiGraph, taps: Iterable[str]) -> set[str]:
    """The nodes through which vectors are sent back to these taps."""
    edges = _sent_back(network)
    flow = nx.DiGraph(edges)
    above = {key for key in taps if key in flow}
    above |= {reader for key in tuple(above) for reader in nx.descendants(flow, key)}
    return {v for u, v in edges if u in above}
