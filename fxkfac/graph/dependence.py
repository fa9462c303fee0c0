"""Which nodes hold values of the data, and which only their sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


def length(t: Tensor, axis: int) -> int:
    """The length of an axis; `aten.sym_size` is the same, but `vmap` has no rule for it."""
    return t.shape[axis]


# Ops that look at a tensor's shape, not at its values, and so do not use it.
SHAPE_ONLY = {length, aten.sym_stride.int, aten.sym_numel.default}
# Ops that make a tensor of the argument's shape, or of its dtype, and nothing else of it.
LIKE = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
}


# Ops that let no gradient pass: what is behind them is no use of a parameter.
STOPS = {aten.detach.default}


# Ops that give truth values, as decompositions write them, too, of which no front end says so.
COMPARISONS = {
    getattr(getattr(aten, name), kind)
    for name in ("gt", "ge", "lt", "le", "eq", "ne")
    for kind in ("Scalar", "Tensor")
}


def is_float(node: Node) -> bool:
    """Whether a gradient may pass; where neither the op nor the front end says so, it may."""
    value = node.meta.get("val")
    if node.target in COMPARISONS:
        return False
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def reach_output(graph: Graph) -> set[Node]:
    """All nodes on whose values the output depends by a path that lets gradients pass.

    Whole numbers and truth values, as of a nearest code or a gate, let none pass.
    """
    alive: set[Node] = set()
    for node in reversed(graph.nodes):
        reached = node.op == "output" or node in alive
        if reached and node.target not in SHAPE_ONLY | LIKE | STOPS:
            alive |= {n for n in node.all_input_nodes if is_float(n)}
    return alive


def depend_on(
    graph: Graph,
    inputs: Sequence[Node],
    besides: Collection[Node] = (),
    blind: Collection[Any] = frozenset(SHAPE_ONLY | LIKE),
) -> set[Node]:
    """All nodes whose values depend on those of the inputs, not on their shapes alone.

    Args:
        graph: The graph.
        inputs: Some of its nodes.
        besides: Nodes whose values are given, whatever they are computed from.
        blind: Ops that look at no values; without `LIKE` what has the axes of the inputs counts.
    """
    dependent = set(inputs)
    for node in graph.nodes:
        if node in besides or node.target in blind:
            continue
        if dependent & set(node.all_input_nodes):
            dependent.add(node)
    return dependent
