"""What is drawn -> picture, in the language of graphviz: boxes, parameters, ops, and their edges.

`labels` says what the nodes look like, `boxes` in which modules they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import graphviz
import networkx as nx

from fxkfac.graph.drawing import labels
from fxkfac.graph.drawing.boxes import (
    Box,
    Scope,
    beside_of,
    boxes,
    names_around,
    plain_scopes,
    scopes,
)
from fxkfac.graph.drawing.colour import Scale
from fxkfac.graph.table import counted

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

FONT = "Helvetica,Arial,sans-serif"
GRAPH = {
    "rankdir": "TB", "nodesep": "0.3", "ranksep": "0.32", "pad": "0.1",
    "fontname": FONT, "fontsize": "10", "labelloc": "b", "newrank": "true", "remincross": "false",
}  # fmt: skip
CLOSE = {"ranksep": "0.17", "nodesep": "0.2"}  # for a page of a screen
NODE = {"fontname": FONT, "fontsize": "10", "shape": "box", "height": "0.3"}
EDGE = {
    "fontname": FONT,
    "fontsize": "8.5",
    "arrowsize": "0.6",
    "arrowhead": "normal",
    "color": labels.SLATE,
}


def dot_source(
    program: Program, network: nx.MultiDiGraph, scale: Scale | None = None, **attributes: str
) -> str:
    """The picture in the language of graphviz.

    Args:
        program: What `fxkfac.trace` returned.
        network: What `drawn` returned.
        scale: The numbers that colours stand for.
        attributes: Further attributes of the whole graph.
    """
    spaced = GRAPH | (CLOSE if network.graph["fold"] else {}) | attributes
    dot = graphviz.Digraph(graph_attr=spaced, node_attr=NODE, edge_attr=EDGE)
    dot.attr(label=labels.legend(network, scale))
    places = scopes(network)
    picture = _Picture(network, places, counts_text(program))
    for key, node in network.nodes(data=True):
        if node["kind"] in ("input", "prediction"):
            picture.add_node(dot, key)
    picture.add_box(dot, boxes(program, network, places, picture.plain))
    picture.align_unused(dot)
    for u, v, place in network.edges:
        picture.add_edge(dot, u, v, place)
    return str(dot.source)


def counts_text(program: Program) -> str:
    """How many parameters are covered, in how many uses."""
    text = counted(len(program.parameters), len(program.uses))
    lost = f", {len(program.uncovered)} {labels.STRUCTURES[program.unsupported]}"
    return text + lost if program.uncovered else text


class _Picture:
    """Writes nodes, boxes and edges; `scopes` says in which box each node is drawn."""

    def __init__(self, network: nx.MultiDiGraph, scopes: dict[str, Scope], counts: str) -> None:
        self.network, self.scopes, self.counts = network, scopes, counts
        self.plain = plain_scopes(network, scopes) if network.graph["fold"] else set()
        nodes = network.nodes(data="kind")
        self.beside = {key: beside_of(network, key) for key, kind in nodes if kind == "parameter"}
        self.stacks: dict[str, list[str]] = {}  # by the op beside which they stand
        for key, beside in self.beside.items():
            self.stacks.setdefault(beside, []).append(key)
        for stack in self.stacks.values():  # ties last: they leave the stack downwards
            stack.sort(key=lambda parameter: network.out_degree(parameter) > 1)
        self.stack_of = {key: stack[0] for stack in self.stacks.values() for key in stack}

    def add_box(self, dot: graphviz.Digraph, box: Box, depth: int = 0) -> None:
        """One box with its nodes and the boxes in it."""
        with dot.subgraph(name=f"cluster_{'.'.join(box.scope)}") as cluster:
            is_model, is_close = not box.scope, self.network.graph["fold"]
            remark = self.counts if is_model else box.remark
            cluster.attr(
                label=labels.title(box.name, remark, box.count, lines=1 + is_model),
                labelloc="t", labeljust="l", style="rounded,filled",
                margin="6" if is_close else "10",
                color=labels.LINE, fillcolor=labels.nesting(depth),
            )  # fmt: skip
            if box.plain:
                cluster.attr(label="", style="invis", margin="0")
            for key in box.nodes:
                self.add_node(cluster, key)
            for inner in box.inner:
                self.add_box(cluster, inner, depth + 1)

    def add_node(self, dot: graphviz.Digraph, key: str) -> None:
        """One node; the parameters of one op stand beside it in one stack."""
        node = self.network.nodes[key]
        remark = "\n".join(t for t in (node.get("code"), node.get("reason")) if t) or node["name"]
        if node["kind"] != "parameter":
            entering = [edge for *_, edge in self.network.in_edges(key, data=True)]
            look = labels.look(node, entering, self.network.graph["fold"])
        elif self.stack_of[key] == key:
            around = names_around(self.network, self.scopes[key], self.plain)
            beside = self.beside[key]
            is_level = beside not in ("", key)
            look = labels.stack_look(self.network, self.stacks[beside], around, is_level)
        else:
            return
        dot.node(key, tooltip=graphviz.escape(remark), **look)
        self._align(dot, key)

    def _align(self, dot: graphviz.Digraph, key: str) -> None:
        """Put the stack of parameters, and the texts on edges of ties, on the level of the op."""
        with dot.subgraph(graph_attr={"rank": "same"}) as row:
            row.node(key)
            for stack in self.stacks.get(key, [])[:1]:
                row.node(stack)
            for u, v, place in self.network.in_edges(key, keys=True):
                text = labels.use_text(self.network, u, v, place) if u in self.beside else ""
                if text and not self._is_level(u, v, place) and self.beside[u] != u:
                    color = labels.color_of(self.network.nodes[u])
                    row.node(f"{u} {v} {place}", **labels.edge_text(text, color))

    def align_unused(self, dot: graphviz.Digraph) -> None:
        """Put parameters without use on the level of the last op, but not into its box."""
        if "" not in self.stacks:
            return
        (end,) = (key for key, kind in self.network.nodes(data="kind") if kind == "prediction")
        with dot.subgraph(graph_attr={"rank": "same"}) as row:
            row.node(self.stacks[""][0])
            for last in list(self.network.predecessors(end))[:1]:
                row.node(last)

    def _is_level(self, u: str, v: str, place: int) -> bool:
        """Whether a parameter stands beside the op that it enters, and this is its first use."""
        return (v, place) == (self.beside[u], 0)

    def add_edge(self, dot: graphviz.Digraph, u: str, v: str, place: int) -> None:
        """A use, or data and the gradient that flows against them."""
        edge = self.network.edges[u, v, place]
        if edge["kind"] == "parameter":
            return self._add_use(dot, u, v, place)
        dot.edge(u, v, weight="8")
        if edge["gradient"]:
            dot.edge(u, v, dir="back", color=labels.RED, style="dashed", weight="8")

    def _add_use(self, dot: graphviz.Digraph, u: str, v: str, place: int) -> None:
        """The first use leaves a parameter to the right; the others go down to their ops."""
        color = labels.color_of(self.network.nodes[u])
        text = labels.use_text(self.network, u, v, place)
        beside = self.beside[u]
        port, last = f"{self.stack_of[u]}:{u}", u == self.stacks[beside][-1]
        if self._is_level(u, v, place):
            dot.edge(f"{port}{'_text' if text else ''}:e", f"{v}:w", color=color)
        elif beside == u:
            dot.edge(f"{port}:s", v, color=color, fontcolor=color, label=text)
        elif text:
            down = {"weight": "0", "arrowhead": "none"}
            dot.edge(f"{port}:{'s' if last else 'w'}", f"{u} {v} {place}:w", color=color, **down)
            dot.edge(f"{u} {v} {place}:e", f"{v}:w", color=color)
        else:
            dot.edge(f"{port}:{'s' if last else 'w'}", f"{v}:w", color=color, weight="0")
