"""Captured graph and uses -> tapped graph.

Requires: the graph that `match` read. Result: the same graph, which hands the output of every op
and the input of every use to a sink, the moment they are there: the sink decides what is kept, and
for how long. Gradients are read at the outputs; the parameters ask for none, so no weight gradient
is ever computed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxkfac.graph.real import checked_lengths
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, Routed

aten = torch.ops.aten

DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


class Sink(Protocol):
    """What a tapped graph hands its taps to while it runs."""

    def output(self, place: int, y: Tensor) -> Tensor:
        """The output of the uses with `tap == place`. The graph goes on with what is returned."""
        ...

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """The input of a use, by its position, and the output of its op.

        The input is `None` where it is the constant one.
        """
        ...


def tap(y: Tensor) -> Tensor:
    """Make `y` a place at which gradients can be read."""
    # Below the lowest tap nothing requires gradients, so autograd's graph begins here.
    return y if y.requires_grad else y.detach().requires_grad_()


@dataclass(frozen=True)
class Taps:
    """A sink that keeps everything.

    Attributes:
        inputs: The input of every use, by its position.
        outputs: The outputs at which gradients are read, by `Use.tap`.
    """

    inputs: dict[int, Input] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def output(self, place: int, y: Tensor) -> Tensor:
        """Keep an output."""
        self.outputs[place] = tap(y)
        return self.outputs[place]

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Keep an input."""
        self.inputs[use] = x

    def gradients(self, prediction: Tensor, cotangent: Tensor) -> dict[int, Tensor]:
        """The gradients of ⟨cotangent, prediction⟩ at all outputs."""
        if not self.outputs or not prediction.requires_grad:
            return {k: torch.zeros_like(y) for k, y in self.outputs.items()}
        found = torch.autograd.grad(
            prediction,
            list(self.outputs.values()),
            cotangent,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.outputs, found, strict=True))


def tap_uses(module: GraphModule, uses: Sequence[Use]) -> tuple[GraphModule, tuple[Use, ...]]:
    """Insert a tap behind the op of every use.

    Returns:
        A module whose first argument is a sink, and which returns the prediction; and the uses,
        their `tap` filled in.
    """
    graph = copy.deepcopy(module.graph)
    nodes = {n.name: n for n in graph.nodes}
    with graph.inserting_before(next(iter(graph.nodes))):
        sink = graph.placeholder("sink")
    places = list(dict.fromkeys(use.node for use in uses))
    # A use may read the output of another one: then what it reads is that tap.
    nodes |= {name: _tapped(graph, sink, k, nodes[name]) for k, name in enumerate(places)}
    order = {n: k for k, n in enumerate(graph.nodes)}
    for k, use in enumerate(uses):
        read = [n for n in (use.form.input, use.form.routes and use.form.routes.index) if n]
        arguments = [*(nodes[n.name] for n in read), nodes[use.node]]
        with graph.inserting_after(max(arguments, key=order.__getitem__)):
            graph.call_function(_give_input, (sink, k, *arguments))
    graph.lint()
    placed = tuple(replace(use, tap=places.index(use.node)) for use in uses)
    return GraphModule(module, graph), placed


def _tapped(graph: Graph, sink: Node, place: int, node: Node) -> Node:
    with graph.inserting_after(node):
        inserted = graph.call_function(_give_output, (sink, place, node))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    return inserted


def tap_nodes(graph: Graph) -> dict[int, Node]:
    """The taps of a tapped graph by `Use.tap`: what the graph goes on with."""
    return {n.args[1]: n for n in graph.nodes if n.target is _give_output}


def _give_output(sink: Sink, place: int, y: Tensor) -> Tensor:
    return sink.output(place, y)


def _give_input(sink: Sink, use: int, *tensors: Tensor) -> None:
    *read, y = tensors
    x = Routed(*read) if len(read) > 1 else (read[0] if read else None)
    sink.input(use, x, y)


def without_dropout(module: GraphModule) -> GraphModule:
    """The same graph with every dropout switched off, which takes data in any order and number."""
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if node.target in (*DROPOUTS, checked_lengths):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.native_dropout.default:
            node.args = (*node.args[:2], False)
        elif node.target is aten.bernoulli.p:  # in a stack of recurrent layers; its mean is 1 − p
            node.target = aten.full_like.default
        elif node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
    return GraphModule(module, graph)
