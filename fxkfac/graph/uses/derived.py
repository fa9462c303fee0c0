"""Weights that are computed from parameters: `g v/‖v‖`, `W + B A`, an orthogonal map.

Such a weight enters a linear op as a parameter would, and has Kronecker factors of its own. The
parameters that it is computed from then have no block; their gradient is the weight's, pulled back.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxkfac.errors import OptionError
from fxkfac.graph.dependence import LIKE, SHAPE_ONLY, STOPS, depend_on, length
from fxkfac.graph.uses.view import is_layout


def derived_weights(
    graph: Graph, parameters: Mapping[Node, str], inputs: Mapping[Node, int | None]
) -> dict[Node, str]:
    """The tensors that are computed from `parameters` alone and meet data, with their names.

    Layout ops behind the computation are views of the weight, as behind a parameter. What lets no
    gradient pass is a constant.

    Args:
        graph: A captured graph.
        parameters: The placeholders of these parameters, with their names.
        inputs: Those of the data, with the batch axis of each, `None` where it has none.

    Raises:
        OptionError: A parameter meets data itself, or the weight is another one for each datum.
    """
    sources: dict[Node, tuple[str, ...]] = {n: (name,) for n, name in parameters.items()}
    data = depend_on(graph, list(inputs))
    # A row of ones for each datum, say, as where derivatives are taken in the inputs.
    shaped = [n for n in graph.nodes if n.target in LIKE and data & set(n.all_input_nodes)]
    data = depend_on(graph, [*inputs, *shaped])
    for node in graph.nodes:
        if node in data or node.target in SHAPE_ONLY | LIKE | STOPS:
            continue
        if found := [s for n in node.all_input_nodes for s in sources.get(n, ())]:
            sources[node] = tuple(dict.fromkeys(found))
    meets = [n for n in sources if n not in data and any(u in data for u in n.users)]
    roots = dict.fromkeys(_root(n) for n in meets)
    lengths = {n for n in graph.nodes if _is_other_length(n, inputs)}
    for root in roots:
        if root in parameters:
            raise OptionError(
                f"{parameters[root]!r} has structure 'derived', but enters an op with the data "
                "itself; expected a computation from parameters alone in between. Leave it out."
            )
        value = root.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise OptionError(
                f"the weight computed from {', '.join(sources[root])} is complex; expected a real "
                "one. Take the structure 'diagonal' or 'dense' in the place of 'derived'."
            )
        if not _behind(root, lengths).isdisjoint(inputs):
            raise OptionError(
                f"the weight computed from {', '.join(sources[root])} has the batch size in its "
                "shape; expected one weight for all data. Repeat it after it is computed, or take "
                "the structure 'diagonal' or 'dense'."
            )
    names: dict[Node, str] = {}
    for root in roots:
        names[root] = _unique(_name(root, sources[root]), names.values())
    return names


def require_no_other(
    graph: Graph, derived: Mapping[Node, str], parameters: Mapping[Node, str]
) -> None:
    """Raise `OptionError` where one of these parameters enters the computation of a weight.

    Args:
        graph: A captured graph.
        derived: What `derived_weights` returned.
        parameters: Placeholders of parameters that are to have blocks of their own.
    """
    for root, weight in derived.items():
        for name in entering(graph, root, parameters):
            raise OptionError(
                f"{name!r} enters the weight {weight!r}, which has a block of its own; expected "
                "'derived' for all parameters that it is computed from. Say structure="
                f"{{{name!r}: 'derived'}}, or 'identity' or 'skip', too."
            )


def entering(graph: Graph, root: Node, parameters: Mapping[Node, str]) -> tuple[str, ...]:
    """Which of these parameters, by placeholders, a node is computed from, not by sizes alone."""
    blind = SHAPE_ONLY | LIKE | STOPS
    return tuple(
        name for node, name in parameters.items() if root in depend_on(graph, [node], blind=blind)
    )


def _is_other_length(node: Node, inputs: Mapping[Node, int | None]) -> bool:
    """Whether it is the length of an axis of the data that is not that of the batch."""
    if node.target is not length:
        return False
    of, axis = node.args
    return of in inputs and axis != inputs[of]  # type: ignore[index]  # a node


def _behind(node: Node, stops: set[Node]) -> set[Node]:
    """All nodes that it is computed from, if by their sizes alone; of `stops` nothing is."""
    found, left = {node}, [node]
    while left:
        last = left.pop()
        new = set() if last in stops else set(last.all_input_nodes) - found
        found |= new
        left += new
    return found


def _root(node: Node) -> Node:
    while node.op != "placeholder" and is_layout(node) and isinstance(node.args[0], Node):
        before = node.args[0]  # further arguments are sizes
        if node.target is operator.getitem and not is_layout(before):
            break  # one of several results, as of a decomposition
        node = before
    return node


def _name(root: Node, sources: tuple[str, ...]) -> str:
    """`0.weight` for `0.parametrizations.weight.original0`, else the op and its parameters."""
    parametrized = {s.rpartition(".")[0].replace("parametrizations.", "") for s in sources}
    if len(parametrized) == 1 and all("parametrizations." in s for s in sources):
        return parametrized.pop()
    made = root.all_input_nodes[0] if root.target is operator.getitem else root
    op = getattr(made.target, "__name__", str(made.target)).partition(".")[0]
    return f"{op}({', '.join(sources)})"


def _unique(name: str, taken: Any) -> str:
    k, found = 1, name
    while found in taken:
        k, found = k + 1, f"{name} #{k + 1}"
    return found


def computation(module: GraphModule, names: Sequence[str]) -> GraphModule:
    """The part of a captured graph that computes the nodes of these names, as a list."""
    graph = copy.deepcopy(module.graph)
    nodes = {n.name: n for n in graph.nodes}
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ([nodes[name] for name in names],)
    graph.eliminate_dead_code()
    return GraphModule(module, graph)
