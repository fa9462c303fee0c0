"""Graphs that write to nothing: what `torch.export` records of most models, as it comes.

`run_decompositions({})` makes any recorded graph functional by recording it once more, which takes
longer than the first time. A graph without effects would come back the same, but for the names of
its nodes and for views that it spells otherwise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import default_decompositions
from torch.fx import Graph, Node

from fxkfac.graph.overloads import arguments, is_arithmetic
from fxkfac.graph.uses.view import LAYOUT_OPS

aten = torch.ops.aten

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

# Composite ops that write to a buffer, or draw, in training alone; and the argument that says so.
IN_TRAINING = {aten.batch_norm.default: "training", aten.dropout.default: "train"}


def is_functional(graph: Graph) -> bool:
    """Whether every node is a functional op that other passes know as it is."""
    return all(_is_pure(n) for n in graph.nodes if n.op not in ("placeholder", "output"))


def _is_pure(node: Node) -> bool:
    if node.target in IN_TRAINING:
        return arguments(node)[IN_TRAINING[node.target]] is False
    return node.target in LAYOUT_OPS or _is_pure_op(node.target)


@cache
def _is_pure_op(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return is_arithmetic(target)
    if target._schema.is_mutable:
        return False
    # Composite ops that need not be taken apart are the ones that torch lists.
    return target in default_decompositions() or not target.has_kernel_for_dispatch_key(COMPOSITE)


def is_idle(node: Node) -> bool:
    """Whether it is a dropout that drops nothing."""
    return node.target is aten.dropout.default and arguments(node)["train"] is False
