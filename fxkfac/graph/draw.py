"""Program -> picture: modules, parameters, linear ops with their taps, and the gradient's way down.

The picture is `folded(to_networkx(program))` in the language of graphviz, rendered by `dot`.
`labels` says what its nodes look like.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graphviz
import networkx as nx
from torch import nn

from fxkfac.errors import FxkfacError, OptionError
from fxkfac.graph import labels
from fxkfac.graph.fold import common_path, folded
from fxkfac.graph.network import to_networkx

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

FORMATS = (".svg", ".png", ".pdf", ".gv")
FONT = "Helvetica,Arial,sans-serif"
GRAPH = {
    "rankdir": "TB", "nodesep": "0.3", "ranksep": "0.32", "pad": "0.1", "dpi": "144",
    "fontname": FONT, "fontsize": "10", "labelloc": "b",
}  # fmt: skip
NODE = {"fontname": FONT, "fontsize": "10", "shape": "box", "height": "0.3"}
EDGE = {"fontname": FONT, "fontsize": "8.5", "arrowsize": "0.6", "color": labels.SLATE}

Scope = tuple[str, ...]  # the path of nested modules


def draw(program: Program, path: str | os.PathLike[str]) -> str:
    """Draw the program.

    Args:
        program: What `fxkfac.trace` returned.
        path: Where to write. Its ending says the format: .svg, .png, .pdf, or .gv for the source.

    Returns:
        The path that was written. Where `dot` is missing this is the source, `<path>.gv`.

    Raises:
        OptionError: Another ending.
        FxkfacError: The file cannot be written.
    """
    name = os.fspath(path)
    ending = Path(name).suffix.lower()
    if ending not in FORMATS:
        raise OptionError(
            f"path={name!r} ends in {ending!r}; expected one of {', '.join(FORMATS)}. "
            "The ending says the format."
        )
    source = dot_source(program).encode()
    if ending == ".gv":
        return _write(name, source)
    try:
        rendered = graphviz.Source(source.decode()).pipe(format=ending[1:], quiet=True)
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError) as error:
        written = _write(f"{name}.gv", source)
        warnings.warn(_how_to_render(error, written, name, ending[1:]), stacklevel=3)
        return written
    return _write(name, rendered)


def _how_to_render(error: Exception, source: str, path: str, ending: str) -> str:
    missing = isinstance(error, graphviz.ExecutableNotFound)
    why = "the program `dot` was not found" if missing else f"`dot` failed ({error})"
    return (
        f"{why}: the drawing's source was written to {source} instead. Install graphviz (apt "
        "install graphviz, brew install graphviz, conda install graphviz, or "
        f"https://graphviz.org/download) and run `dot -T{ending} {source} -o {path}`."
    )


def _write(path: str, content: bytes) -> str:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise FxkfacError(
            f"cannot write the drawing to {path!r}: {error.strerror}. Make the folder, or choose "
            "a path that you may write to."
        ) from error
    return path


def dot_source(program: Program) -> str:
    """The picture in the language of graphviz."""
    network = folded(to_networkx(program))
    dot = graphviz.Digraph(graph_attr=GRAPH, node_attr=NODE, edge_attr=EDGE)
    dot.attr(label=labels.legend(network))
    picture = _Picture(program, network, _scopes(program, network))
    for key, node in network.nodes(data=True):
        if node["kind"] in ("input", "prediction"):
            picture.add_node(dot, key)
    picture.add_cluster(dot, ())
    for u, v, edge in network.edges(data=True):
        picture.add_edge(dot, u, v, edge)
    return str(dot.source)


def _scopes(program: Program, network: nx.MultiDiGraph) -> dict[str, Scope]:
    """In which nested modules each node is drawn; for a function, in which of its functions."""
    of_module = isinstance(program.model.model, nn.Module)
    scopes: dict[str, Scope] = {}
    for key, node in network.nodes(data=True):
        if "op" in node:
            inside = node["module"] if of_module else node["function"]
            root = "" if of_module else network.graph["model"]
            scopes[key] = tuple(inside.split(".")) if inside not in ("", root) else ()
    quiet = {key for key in scopes if network.nodes[key]["kind"] == "quiet"}
    drawn = {outer for key in scopes if key not in quiet for outer in _outward(scopes[key])}
    for key in quiet:  # a module of quiet ops alone has no box of its own
        scopes[key] = next((s for s in _outward(scopes[key]) if s in drawn), ())
    for key, node in network.nodes(data=True):
        if node["kind"] == "parameter":
            readers = [scopes[v] for v in network.successors(key) if v in scopes]
            scopes[key] = common_path(readers)
    return scopes


def _outward(scope: Scope) -> list[Scope]:
    return [scope[:k] for k in range(len(scope), -1, -1)]


class _Picture:
    """Writes nodes, modules and edges; `scopes` says in which module each node is drawn."""

    def __init__(
        self, program: Program, network: nx.MultiDiGraph, scopes: dict[str, Scope]
    ) -> None:
        self.program, self.network, self.scopes = program, network, scopes
        self.stacks: dict[tuple[str, ...], list[str]] = {}
        for key, node in network.nodes(data=True):
            if node["kind"] == "parameter":
                readers = tuple(dict.fromkeys(network.successors(key)))
                alone = (key,) if len(readers) != 1 else ()
                self.stacks.setdefault((*readers, *alone), []).append(key)
        self.stack_of = {key: stack[0] for stack in self.stacks.values() for key in stack}

    def add_cluster(
        self, dot: graphviz.Digraph, scope: Scope, above: Scope = (), depth: int = 0
    ) -> None:
        """One module with its nodes and the modules in it; one around a single other is left out."""
        here = [key for key, place in self.scopes.items() if place == scope]
        inside = [p for p in self.scopes.values() if p[: len(scope)] == scope != p]
        inner = dict.fromkeys(p[: len(scope) + 1] for p in inside)
        if depth and not here and len(inner) == 1:
            return self.add_cluster(dot, next(iter(inner)), above, depth)
        with dot.subgraph(name=f"cluster_{'.'.join(scope)}") as cluster:
            cluster.attr(
                label=self._title(scope, above), labelloc="t", labeljust="l", margin="10",
                style="rounded,filled", color=labels.LINE, fillcolor=labels.nesting(depth),
            )  # fmt: skip
            for key in here:
                self.add_node(cluster, key)
            for below in inner:
                self.add_cluster(cluster, below, scope, depth + 1)

    def _title(self, scope: Scope, above: Scope) -> str:
        if not scope:
            uses = len(self.program.uses)
            counts = f"{len(self.program.parameters)} parameters in {uses} uses"
            return labels.title(self.network.graph["model"], counts)
        model = self.program.model.model
        path = ".".join(scope)
        kind = type(model.get_submodule(path)).__name__ if isinstance(model, nn.Module) else ""
        return labels.title(".".join(scope[len(above) :]), kind)

    def add_node(self, dot: graphviz.Digraph, key: str) -> None:
        """One node; parameters of one op stand beside it in one stack."""
        node = self.network.nodes[key]
        remark = "\n".join(t for t in (node.get("code"), node.get("reason")) if t) or node["name"]
        tooltip = graphviz.escape(remark)
        if node["kind"] == "parameter":
            if self.stack_of[key] == key:
                self._add_stack(dot, key, tooltip)
        elif node["kind"] == "op":
            entering = [edge for *_, edge in self.network.in_edges(key, data=True)]
            dot.node(key, tooltip=tooltip, **labels.op_look(node, entering))
        else:
            dot.node(key, tooltip=tooltip, **labels.LOOKS[node["kind"]](node))

    def _add_stack(self, dot: graphviz.Digraph, key: str, tooltip: str) -> None:
        keys = [k for k, first in self.stack_of.items() if first == key]
        prefix = "".join(f"{part}." for part in self.scopes[key])
        dot.node(key, tooltip=tooltip, **labels.stack_look(self.network, keys, prefix))
        if reader := self._beside(key):
            with dot.subgraph() as row:
                row.attr(rank="same")
                row.node(key)
                row.node(reader)

    def _beside(self, key: str) -> str:
        """The one op that a parameter enters, if both are drawn in the same module."""
        readers = set(self.network.successors(key))
        same = len(readers) == 1 and self.scopes[key] == self.scopes.get(*readers)
        return readers.pop() if same else ""

    def add_edge(self, dot: graphviz.Digraph, u: str, v: str, edge: dict[str, Any]) -> None:
        """A use, or data and the gradient that flows against them."""
        if edge["kind"] == "data":
            dot.edge(u, v, weight="8")
            if edge["gradient"]:
                dot.edge(u, v, dir="back", color=labels.RED, style="dashed", weight="8")
            return
        color, _ = labels.STATUS[self.network.nodes[u]["status"]]
        beside = self._beside(u)
        tail = f"{self.stack_of[u]}:{u}" + (":e" if beside else ":s")
        dot.edge(
            tail, f"{v}:w" if beside else v, label=self._use(u, edge), color=color, fontcolor=color
        )

    def _use(self, parameter: str, edge: dict[str, Any]) -> str:
        """The view, and the orientation where it is not the same for all uses of the parameter."""
        axes = {o for *_, o in self.network.out_edges(parameter, "orientation", default="")}
        orientation = f"({edge['orientation']})" if len(axes) > 1 and "orientation" in edge else ""
        return "  ".join(filter(None, (edge["view"], orientation)))
