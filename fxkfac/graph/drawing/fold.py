"""Network -> the network as it is drawn: without side issues, and with quiet ops folded.

Requires: what `to_networkx` returns. Result: a copy in which every quiet node has `ops`, the names
of all the ops that it stands for. No way between two other nodes is lost or made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import networkx as nx

# What only moves entries about.
MOVES = ["transpose", "permute", "movedim", "t", "mT", "numpy_T", "contiguous"]
SHAPES = ["reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"]
PARTS = ["slice", "narrow", "expand"]
LAYOUT = {*MOVES, *SHAPES, *PARTS}


def relevant(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A copy without what has no part in the curvature; `parametric` ops read a parameter."""
    network = network.copy()
    for key, node in network.nodes(data=True):
        node["parametric"] = "parameter" in (kind for *_, kind in network.in_edges(key, "kind"))
    network.remove_nodes_from([k for k, n in network.nodes(data=True) if _is_aside(n)])
    fed = {k for k, n in network.nodes(data=True) if n["kind"] not in ("quiet", "prediction")}
    fed |= {d for k in list(fed) for d in nx.descendants(network, k)}
    network.remove_nodes_from(set(network) - fed)
    for _, node in network.nodes(data=True):
        node["ops"] = node.get("op", "")
    return network


def folded(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """Leave out what has no part in the curvature, and merge quiet ops where no way gets lost."""
    network = relevant(network)
    fold_quiet(network)
    return network


def fold_quiet(network: nx.MultiDiGraph) -> None:
    """Merge quiet ops, in place, where no way gets lost, and none that repeats with others."""
    while sum(_fold_chain(network, key) or _fold_twins(network, key) for key in list(network)):
        pass


def drop_layout(network: nx.MultiDiGraph) -> None:
    """Leave out, in place, quiet ops that only give the entries of one op another layout."""
    for key in list(network):
        sources, readers = _ways(network, key)
        is_layout = _is_quiet(network, key) and network.nodes[key]["ops"] in LAYOUT
        if is_layout and len(sources) == 1 and readers:
            _bypass(network, next(iter(sources)), key)


def _bypass(network: nx.MultiDiGraph, source: str, key: str) -> None:
    """Let what reads a node read the only one before it."""
    for reader in list(network.successors(key)):
        edge = network.edges[key, reader, 0]
        if network.has_edge(source, reader):
            network.edges[source, reader, 0]["gradient"] |= edge["gradient"]
        else:
            network.add_edge(source, reader, **edge)
    network.remove_node(key)


def common_path(paths: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The parts with which all of these paths begin."""
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return tuple(parts[0] for parts in alike)


def _is_aside(node: dict[str, Any]) -> bool:
    return node["kind"] == "buffer" or node.get("status") == "frozen"


def _is_quiet(network: nx.MultiDiGraph, key: str) -> bool:
    """Whether a node is a quiet op that no parameter enters."""
    entering = (kind for *_, kind in network.in_edges(key, "kind"))
    return network.nodes[key]["kind"] == "quiet" and "parameter" not in entering


def _fold_chain(network: nx.MultiDiGraph, key: str) -> bool:
    """Merge a quiet op with the one behind it, if no op feeds or reads only one of the two."""
    if key not in network or not _is_quiet(network, key):
        return False
    before, after = _ways(network, key)
    for behind in (k for k in after if _is_quiet(network, k) and _together(network, key, k)):
        feeds, reads = _ways(network, behind)
        if (after == {behind} and feeds - {key} <= before) or (
            feeds == {key} and after - {behind} <= reads
        ):
            ops = " · ".join(network.nodes[k]["ops"] for k in (key, behind))
            _merge(network, key, behind, ops)
            return True
    return False


def _fold_twins(network: nx.MultiDiGraph, key: str) -> bool:
    """Merge quiet ops that do the same side by side, as those of query, key and value do."""
    if key not in network or not _is_quiet(network, key):
        return False
    ops, ways = network.nodes[key]["ops"], _ways(network, key)
    siblings = {k for before in ways[0] for k in network.successors(before)} - {key}
    quiet = [k for k in siblings if _is_quiet(network, k) and network.nodes[k]["ops"] == ops]
    twins = [k for k in quiet if _ways(network, k) == ways and _together(network, key, k)]
    label = f"{len(twins) + 1} × ({ops})" if " " in ops else f"{len(twins) + 1} × {ops}"
    for twin in twins:
        _merge(network, key, twin, label)
    return bool(twins)


def _together(network: nx.MultiDiGraph, key: str, other: str) -> bool:
    """Whether two nodes are in the same repeated layers."""
    return network.nodes[key].get("repeats") == network.nodes[other].get("repeats")


def _ways(network: nx.MultiDiGraph, key: str) -> tuple[set[str], set[str]]:
    return set(network.predecessors(key)), set(network.successors(key))


def _merge(network: nx.MultiDiGraph, key: str, other: str, ops: str) -> None:
    """Let `key` stand for both nodes; a gradient passes where it passed along one of them."""
    ends = [*network.in_edges(other, data=True), *network.out_edges(other, data=True)]
    for u, v, edge in ends:
        u, v = (key if end == other else end for end in (u, v))
        if u != v and network.has_edge(u, v):
            network.edges[u, v, 0]["gradient"] |= edge["gradient"]
        elif u != v:
            network.add_edge(u, v, **edge)
    module, also = (network.nodes[k]["module"].split(".") for k in (key, other))
    path = common_path(network.nodes[k].get("path", ()) for k in (key, other))
    network.nodes[key].update(ops=ops, module=".".join(common_path([module, also])), path=path)
    network.remove_node(other)
