"""Additions: a parameter that is added to something, broadcast over the rows."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxkfac.graph.form import Form
from fxkfac.graph.rules.products import broadcast
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten

SIGNS = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}


@rule(aten.add.Tensor, aten.sub.Tensor)
def add(call: Call, operand: Operand) -> Form:
    """y = a ± α b."""
    factor = addition_factor(call.node, call.args[operand.name])
    if not factor:
        raise NotLinear("the parameter is added to itself, or not at all")
    return broadcast(call, operand.name, factor)


def addition_factor(node: Node, term: Node) -> float:
    """What an addition multiplies one of its terms by; 0 where it is no addition of that term."""
    if node.target not in SIGNS or node.args.count(term) != 1:
        return 0.0
    if node.args[0] is term:
        return 1.0
    return SIGNS[node.target] * float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
