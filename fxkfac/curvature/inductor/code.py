"""A piece of a graph as code of its own, compiled by inductor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxkfac.curvature.inductor import mended
from fxkfac.errors import FxkfacError
from fxkfac.graph.overloads import draws
from fxkfac.graph.quiet import quietly

EAGER = "Use backend='eager'."
# Dropout draws what it draws without compilation.
OPTIONS: dict[str, Any] = {"fallback_random": True, **mended.OPTIONS}

Values = Mapping[str, Tensor]  # of the joint graph's nodes, by their names


@dataclass
class Code:
    """A part of the joint graph, compiled when it first runs.

    Attributes:
        reads: What it is given.
        gives: What it returns.
        module: Its graph.
        replays: Whether a GPU is sent all of it at once, as a CUDA graph, which keeps what it is
            given in a copy.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    module: GraphModule
    replays: bool = False
    _run: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, values: Values) -> Values:
        """These values and those that it gives."""
        if not self.gives:
            return values
        given = [values[name] for name in self.reads]
        with torch.no_grad():
            if self._run is None:
                options = OPTIONS | {"triton.cudagraphs": self.replays}
                self._run = _compiled(self.module, given, options)
            found = self._run(*given)
            # What a CUDA graph returns is written over when it is replayed.
            found = _copies(found) if self.replays else found
            return {**values, **dict(zip(self.gives, found, strict=True))}


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))  # one call for all of one dtype
    return copies


def nodes_in(nested: Any) -> list[Node]:
    """All nodes of something nested, each one once."""
    return list(dict.fromkeys(n for n in pytree.tree_leaves(nested) if isinstance(n, Node)))


def mapped(change: Callable[[Any], Any], kind: type, nested: Any) -> Any:
    """What is nested in tuples, lists and dictionaries, with all of one kind changed.

    `pytree.tree_map_only` knows more, and takes half of a small compiled batch.
    """
    if isinstance(nested, kind):
        return change(nested)
    if isinstance(nested, dict):
        return {key: mapped(change, kind, part) for key, part in nested.items()}
    if isinstance(nested, tuple | list):
        parts = [mapped(change, kind, part) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    return nested


def names_of(nested: Any) -> Any:
    """What is nested, with names in the place of nodes."""
    return mapped(lambda node: node.name, Node, nested)


def read(names: Any, values: Values) -> Any:
    """What is nested, with values in the place of names."""
    return mapped(values.__getitem__, str, names)


def code_of(joint: GraphModule, results: Any, inside: set[Node], replays: bool = False) -> Code:
    """What computes results from values that are there before.

    Args:
        joint: The graph.
        results: Nodes, nested in whatever way.
        inside: What the part may compute; beside these only views of what it is given. What draws
            random numbers is computed in any case: those that come after are drawn after it.
        replays: As of `Code`.
    """
    given = [n for n in nodes_in(results) if n in inside and n.op != "placeholder"]
    needed, reads = _needed(given, inside)
    if unread := [n for n in joint.graph.nodes if n in inside - needed and draws(n.target)]:
        given += [_first(joint.graph, n) for n in unread]
        needed, reads = _needed(given, inside | set(given))
    order = [n for n in joint.graph.nodes if n in reads]
    module = _extract(joint, order, needed, given)
    return Code(tuple(n.name for n in order), tuple(n.name for n in given), module, replays)


def _needed(given: list[Node], inside: set[Node]) -> tuple[set[Node], set[Node]]:
    """What is computed for some results, and what is read for it."""
    needed, reads, open_ = set[Node](), set[Node](), list(given)
    while open_:
        node = open_.pop()
        if node in needed or node in reads:
            continue
        if node.op != "placeholder" and (node in inside or node.op == "get_attr" or _is_view(node)):
            needed.add(node)
            open_ += node.all_input_nodes
        else:
            reads.add(node)
    return needed, reads


def _first(graph: Graph, node: Node) -> Node:
    """A tensor of what a node gives."""
    if isinstance(node.meta["val"], Tensor):
        return node
    with graph.inserting_after(node):
        return graph.call_function(operator.getitem, (node, 0))


def _extract(
    joint: GraphModule, reads: list[Node], needed: set[Node], given: list[Node]
) -> GraphModule:
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in reads}
    for node in joint.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in given))
    return GraphModule(joint, graph)


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return isinstance(node.target, OpOverload) and node.target.is_view


def _compiled(
    module: GraphModule, given: list[Tensor], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """What inductor makes of a graph.

    `torch.compile` would check at every call that shapes are those of the trace; they are, here.

    Raises:
        FxkfacError: There is no compiler, or inductor fails.
    """
    import torch._inductor  # takes seconds, and is not needed by default

    try:
        with quietly(), torch.no_grad(), mended.columns_counted_once():
            return torch._inductor.compile(module, list(given), options=options)
    except Exception as error:
        raise _not_compiled(error) from error


def _not_compiled(error: Exception) -> FxkfacError:
    """What to do about it."""
    text = f"{type(error).__name__} {error}"
    if "InvalidCxxCompiler" in text:
        return FxkfacError(
            "backend='inductor' found no C++ compiler. Install one (`apt install g++`, or "
            "`xcode-select --install`), or name it by the environment variable CXX; or use "
            "backend='eager'."
        )
    return FxkfacError(f"backend='inductor' cannot compile: {first_line(error)} {EAGER}")


def first_line(error: Exception) -> str:
    """What an error of torch's says before it goes into details."""
    return f"{type(error).__name__} {error}".split("\n")[0].rstrip(".") + "."
