"""Captured graph and uses -> tapped graph.

Requires: the graph that `match` read. Result: the same graph, which besides the prediction emits
the input of every use and the output of every op that has one. Gradients are read at the outputs;
the parameters ask for none, so no weight gradient is ever computed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxkfac.graph.form import Form
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Routed
from fxkfac.graph.real import checked_lengths

aten = torch.ops.aten

DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


def tap(y: Tensor) -> Tensor:
    """Make `y` a place at which gradients can be read."""
    # Below the lowest tap nothing requires gradients, so autograd's graph begins here.
    return y if y.requires_grad else y.detach().requires_grad_()


def tap_uses(module: GraphModule, uses: Sequence[Use]) -> tuple[GraphModule, tuple[Use, ...]]:
    """Insert a tap behind the op of every use.

    Returns:
        A module that returns (prediction, inputs of the uses, taps), where the k-th input belongs
        to the k-th use (`None` where it is the constant one); and the uses, their `tap` filled in.
    """
    graph = copy.deepcopy(module.graph)
    nodes = {n.name: n for n in graph.nodes}
    places = list(dict.fromkeys(use.node for use in uses))
    taps = [_insert(nodes[name]) for name in places]
    (output,) = (n for n in graph.nodes if n.op == "output")
    # A use may read the output of another one: then what it reads is that tap.
    nodes |= dict(zip(places, taps, strict=True))
    output.args = ((output.args[0], [_input(u.form, nodes) for u in uses], taps),)
    graph.lint()
    placed = tuple(replace(use, tap=places.index(use.node)) for use in uses)
    return GraphModule(module, graph), placed


def _input(form: Form, nodes: Mapping[str, Node]) -> Any:
    if form.input is None:
        return None
    x = nodes[form.input.name]
    return Routed(x, nodes[form.routes.index.name]) if form.routes else x  # type: ignore[arg-type]


def _insert(node: Node) -> Node:
    with node.graph.inserting_after(node):
        inserted = node.graph.call_function(tap, (node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    return inserted


def without_dropout(module: GraphModule) -> GraphModule:
    """The same graph with every dropout switched off, which takes data in any order and number."""
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if node.target in (*DROPOUTS, checked_lengths):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.native_dropout.default:
            node.args = (*node.args[:2], False)
        elif node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
    return GraphModule(module, graph)
