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
    "rankdir": "TB", "nodesep": "0.3", "ranksep": "0.32", "pad": "0.1",
    "fontname": FONT, "fontsize": "10", "labelloc": "b", "newrank": "true", "remincross": "false",
}  # fmt: skip
NODE = {"fontname": FONT, "fontsize": "10", "shape": "box", "height": "0.3"}
EDGE = {
    "fontname": FONT,
    "fontsize": "8.5",
    "arrowsize": "0.6",
    "arrowhead": "normal",
    "color": labels.SLATE,
}

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
    # Only pixels need a resolution; graphviz clips an SVG that has one.
    source = dot_source(program, **({"dpi": "144"} if ending == ".png" else {})).encode()
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


def dot_source(program: Program, **attributes: str) -> str:
    """The picture in the language of graphviz, with further attributes of the whole graph."""
    network = folded(to_networkx(program))
    dot = graphviz.Digraph(graph_attr=GRAPH | attributes, node_attr=NODE, edge_attr=EDGE)
    dot.attr(label=labels.legend(network))
    picture = _Picture(program, network, _scopes(program, network))
    for key, node in network.nodes(data=True):
        if node["kind"] in ("input", "prediction"):
            picture.add_node(dot, key)
    picture.add_cluster(dot, ())
    for u, v, place in network.edges:
        picture.add_edge(dot, u, v, place)
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
            beside = _beside(network, key)
            readers = [beside] if beside in scopes else network.successors(key)
            scopes[key] = common_path(scopes.get(reader, ()) for reader in readers)
    return scopes


def _outward(scope: Scope) -> list[Scope]:
    return [scope[:k] for k in range(len(scope), -1, -1)]


def _beside(network: nx.MultiDiGraph, parameter: str) -> str:
    """The op beside which a parameter is drawn, in one stack with the op's others.

    A parameter of ops side by side is drawn above them, in a stack of its own; those without use
    are in one stack, whose name is empty.
    """
    first, *others = [*network.successors(parameter)] or [""]
    return first if all(nx.has_path(network, first, other) for other in others) else parameter


class _Picture:
    """Writes nodes, modules and edges; `scopes` says in which module each node is drawn."""

    def __init__(
        self, program: Program, network: nx.MultiDiGraph, scopes: dict[str, Scope]
    ) -> None:
        self.program, self.network, self.scopes = program, network, scopes
        self.stacks: dict[str, list[str]] = {}  # by the op beside which they stand
        for key, node in network.nodes(data=True):
            if node["kind"] == "parameter":
                self.stacks.setdefault(_beside(network, key), []).append(key)
        for stack in self.stacks.values():  # ties last: they leave the stack downwards
            stack.sort(key=lambda parameter: network.out_degree(parameter) > 1)
        self.stack_of = {key: stack[0] for stack in self.stacks.values() for key in stack}

    def add_cluster(
        self, dot: graphviz.Digraph, scope: Scope, above: Scope = (), depth: int = 0
    ) -> None:
        """One module with its nodes and modules; one that only holds others has no box."""
        here = [key for key, place in self.scopes.items() if place == scope]
        inside = [p for p in self.scopes.values() if p[: len(scope)] == scope != p]
        inner = dict.fromkeys(p[: len(scope) + 1] for p in inside)
        if depth and not here and (len(inner) == 1 or self._is_list(scope)):
            for below in inner:
                self.add_cluster(dot, below, above, depth)
            return
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
            return labels.title(self.network.graph["model"], self._counts(), lines=2)
        module = self._module(scope)
        kind = type(module).__name__ if module is not None else ""
        return labels.title(".".join(scope[len(above) :]), kind)

    def _counts(self) -> str:
        program = self.program
        covered, uses = len(program.parameters), len(program.uses)
        text = f"{covered} parameter{'s' * (covered != 1)} in {uses} use{'s' * (uses != 1)}"
        lost = f", {len(program.uncovered)} {labels.STRUCTURES[program.unsupported]}"
        return text + lost if program.uncovered else text

    def _module(self, scope: Scope) -> nn.Module | None:
        model = self.program.model.model
        return model.get_submodule(".".join(scope)) if isinstance(model, nn.Module) else None

    def _is_list(self, scope: Scope) -> bool:
        """Whether this is a module that never runs itself."""
        return isinstance(self._module(scope), nn.ModuleList | nn.ModuleDict)

    def add_node(self, dot: graphviz.Digraph, key: str) -> None:
        """One node; the parameters of one op stand beside it in one stack."""
        node = self.network.nodes[key]
        remark = "\n".join(t for t in (node.get("code"), node.get("reason")) if t) or node["name"]
        if node["kind"] != "parameter":
            entering = [edge for *_, edge in self.network.in_edges(key, data=True)]
            look = labels.look(node, entering)
        elif self.stack_of[key] == key:
            prefix = "".join(f"{part}." for part in self.scopes[key])
            beside = _beside(self.network, key)
            is_level = beside not in ("", key)
            look = labels.stack_look(self.network, self.stacks[beside], prefix, is_level)
        else:
            return
        dot.node(key, tooltip=graphviz.escape(remark), **look)
        self._align(dot, key)

    def _align(self, dot: graphviz.Digraph, key: str) -> None:
        """Put the stack of parameters, and the texts on edges of ties, on the level of the op."""
        with dot.subgraph(graph_attr={"rank": "same"}) as row:
            row.node(key)
            is_end = any(n["kind"] == "prediction" for n in self._behind(key))
            for stack in [*self.stacks.get(key, [])[:1], *self.stacks.get("", [])[: int(is_end)]]:
                row.node(stack)
            for u, v, place in self.network.in_edges(key, keys=True):
                text = labels.use_text(self.network, u, v, place)
                if text and not self._is_level(u, v, place) and _beside(self.network, u) != u:
                    color = labels.color_of(self.network.nodes[u])
                    row.node(f"{u} {v} {place}", **labels.edge_text(text, color))

    def _behind(self, key: str) -> list[dict[str, Any]]:
        return [self.network.nodes[after] for after in self.network.successors(key)]

    def _is_level(self, u: str, v: str, place: int) -> bool:
        """Whether a parameter stands beside the op that it enters, and this is its first use."""
        return (v, place) == (_beside(self.network, u), 0)

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
        beside = _beside(self.network, u)
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
