"""A front end's graph -> the one kind of graph that everything else reads.

Requires: a graph of ATen ops. Result: placeholders in a fixed order, one output, no `view`
(`reshape` instead: a functional graph has no aliasing to keep), no assertions, no dead code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxkfac.graph.custom import Whole
from fxkfac.graph.decompositions import decompose
from fxkfac.graph.dependence import length
from fxkfac.graph.front_ends.pure import is_idle
from fxkfac.graph.merge import drop_zeros, kind, merge_common
from fxkfac.graph.overloads import arguments
from fxkfac.graph.real import CheckedLengths, RealRows, checked_lengths, real_rows

aten = torch.ops.aten

STOP = "fxkfac_stop"  # mark of nodes through which the user lets no gradient pass

RENAMED: dict[Any, Any] = {
    aten.sym_size.int: length,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._efficientzerotensor.default: aten.zeros.default,
    Whole(RealRows): real_rows,
    Whole(CheckedLengths): checked_lengths,
}

ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def rebuild(
    module: GraphModule,
    roles: Mapping[str, str | int | Tensor],
    parameters: Sequence[str],
    selected: Sequence[str],
    buffers: Sequence[str],
    inputs: int,
    result: str,
    below_autograd: bool = False,
) -> GraphModule:
    """Copy a graph into the one order of placeholders and the one spelling of ops.

    Args:
        module: The front end's graph.
        roles: For each of its placeholders: the name of a parameter or buffer, the position of an
            input tensor, or a constant.
        parameters, buffers: Their names, in the order in which they become placeholders.
        selected: Names of the parameters whose curvature is asked for.
        inputs: Number of input tensors, the placeholders that follow.
        result: Name of the node that is the prediction.
        below_autograd: Whether a `detach` without mark is one that autograd put there, and zeros
            without mark are forward mode's.
    """
    root = nn.Module()
    graph = Graph()
    names = enumerate([*parameters, *buffers])
    named = {name: graph.placeholder(_identifier(k, name)) for k, name in names}
    tensors = [graph.placeholder(f"input_{k}") for k in range(inputs)]
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = _placeholder(node, roles[node.name], named, tensors, graph, root)
        elif node.op == "get_attr":
            copies[node] = _constant(graph, root, _attribute(module, str(node.target)))
        elif node.target in ASSERTIONS or node.op == "output" or _writes_back(node):
            continue
        elif _is_what_it_is_given(node) or (below_autograd and _is_saved(node)):
            copies[node] = copies[node.all_input_nodes[0]]
        else:
            copies[node] = _copy(graph, node, copies, stop=below_autograd and _stops(node))
    graph.output(copies[next(n for n in module.graph.nodes if n.name == result)])
    graph.eliminate_dead_code()
    if below_autograd:
        drop_zeros(graph)
    decompose(graph, [named[name] for name in selected], tensors)
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        node.target, node.args = copy_, node.args[:2]
    merge_common(graph)
    graph.eliminate_dead_code()
    return GraphModule(root, graph)


def _writes_back(node: Node) -> bool:
    """Whether it is the end of a graph without writes: what the model has written into an input."""
    if node.target is not aten.copy_.default or node.users:
        return False
    into = node.args[0]
    return isinstance(into, Node) and into.op == "placeholder"


def _is_what_it_is_given(node: Node) -> bool:
    if node.target is aten.expand.default:
        return kind(node) == kind(node.all_input_nodes[0]) is not None
    return node.target is aten.alias.default or is_idle(node)


def _placeholder(
    node: Node,
    role: str | int | Tensor,
    named: Mapping[str, Node],
    tensors: list[Node],
    graph: Graph,
    root: nn.Module,
) -> Node:
    if isinstance(role, Tensor):
        return _constant(graph, root, role)
    place = tensors[role] if isinstance(role, int) else named[role]
    place.meta = dict(node.meta)
    return place


def copy_(old: Tensor, new: Tensor) -> Tensor:
    """What `old.copy_(new)` leaves: the functional `aten.copy` has no derivative of its own."""
    return new.to(old.dtype).expand_as(old)


def _copy(graph: Graph, node: Node, copies: Mapping[Node, Node], stop: bool) -> Node:
    copy = graph.node_copy(node, copies.__getitem__)
    copy.target = RENAMED.get(node.target, node.target)
    if node.target is aten.slice_scatter.default:
        _end_at_the_end(copy)
    if stop and node.target is not aten.detach.default and _is_tensor(node):
        return graph.call_function(aten.detach.default, (copy,))
    return copy


def _end_at_the_end(node: Node) -> None:
    """Write out where an axis ends: `vmap` adds to the number that stands for it, and overflows."""
    named = arguments(node)
    if isinstance(named["end"], int) and named["end"] >= sys.maxsize:
        with node.graph.inserting_before(node):
            named["end"] = node.graph.call_function(length, (named["self"], named["dim"]))
        node.args, node.kwargs = tuple(named.values()), {}


def _constant(graph: Graph, root: nn.Module, value: Any) -> Node:
    name = f"constant_{len(list(root.named_buffers())) + len(list(root.children()))}"
    if isinstance(value, Tensor):
        # The tensor itself: what is written into it, or put in its place by `data`, shows.
        root.register_buffer(name, value.detach() if value.requires_grad else value)
    else:
        root.add_module(name, value)
    return graph.get_attr(name)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _stops(node: Node) -> bool:
    return bool((node.meta.get("custom") or {}).get(STOP))


def _is_saved(node: Node) -> bool:
    """Whether a `detach` is one that autograd put there, not the user."""
    return node.target is aten.detach.default and not _stops(node)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _identifier(number: int, name: str) -> str:
    # Numbered, since fx lowers names to snake case and then takes `W` and `w` for one.
    return f"p{number}_" + re.sub(r"\W", "_", name).lower()
