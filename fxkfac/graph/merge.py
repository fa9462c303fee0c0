"""Common subexpressions are computed once.

Nested forward-mode derivatives compute the value again for every direction, and the mixed stream
d₁d₂ beside d₂d₁. Merged, each stream exists once: it costs once, and is one row of the factors.

Requires: a functional graph. Result: the same function; no two nodes have the same op and operands,
and nothing is added that is zero by construction.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxkfac.graph.custom import Whole
from fxkfac.graph.overloads import draws

aten = torch.ops.aten

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
MOVES = {
    aten.expand.default,
    aten.reshape.default,
    aten.permute.default,
    aten.t.default,
    aten._to_copy.default,
    aten.clone.default,
}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mul.Tensor}


OWN = "fxkfac_own"  # mark of zeros that the model asks for, as a recurrent net for its first state


def drop_zeros(graph: Graph) -> None:
    """Rewrite in place: `a + 0` is `a`. Forward mode adds the products with zero tangents.

    Zeros of the model's own are data: the rows of their products count.
    """
    zero: set[Node] = set()
    for node in list(graph.nodes):
        known = [n for n in node.all_input_nodes if n in zero]
        own = (node.meta.get("custom") or {}).get(OWN)
        if (node.target in ZEROS and not own) or (known and node.target in PRODUCTS | MOVES):
            zero.add(node)
        elif known and node.target is aten.add.Tensor and not node.kwargs:
            others = [a for a in node.args if a not in zero]
            if not others:
                zero.add(node)
            elif isinstance(others[0], Node) and kind(others[0]) == kind(node) is not None:
                node.replace_all_uses_with(others[0])
                graph.erase_node(node)


def kind(node: Node) -> tuple[str, ...] | None:
    """Shape and dtype at capture, as text: symbolic sizes are not to be compared as numbers."""
    value = node.meta.get("val")
    return (str(tuple(value.shape)), str(value.dtype)) if isinstance(value, Tensor) else None


def merge_common(graph: Graph) -> None:
    """Rewrite in place: a node that repeats an earlier one gives its users to that one."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    seen: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _is_random(node):
            continue
        key = (node.target, _frozen(_ordered(node, order)), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.lint()


def _is_random(node: Node) -> bool:
    """Whether a second call gives something else than the first, or changes its arguments."""
    if not isinstance(node.target, OpOverload):
        return isinstance(node.target, Whole)  # nobody knows
    schema = node.target._schema
    drops = any("dropout" in name for name in (schema.name, *(a.name for a in schema.arguments)))
    return draws(node.target) or schema.is_mutable or drops


def _ordered(node: Node, order: dict[Node, int]) -> tuple[Any, ...]:
    nodes = [a for a in node.args if isinstance(a, Node)]
    if node.target not in COMMUTATIVE or len(nodes) != len(node.args) or node.kwargs:
        return node.args
    return tuple(sorted(nodes, key=order.__getitem__))


def _frozen(value: Any) -> Hashable:
    """Arguments as something that can be compared, in which 1, 1.0 and True differ."""
    if isinstance(value, Node):
        return value
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value).__name__, repr(value)
