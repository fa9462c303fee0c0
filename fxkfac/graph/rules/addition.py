"""Additions: a parameter that is added to something, broadcast over the rows."""

from __future__ import annotations

import torch

from fxkfac.graph.ir import Form
from fxkfac.graph.rules.products import broadcast
from fxkfac.graph.rules.registry import Call, Operand, rule

aten = torch.ops.aten


@rule(aten.add.Tensor)
def add(call: Call, operand: Operand) -> Form:
    """y = a + α b."""
    alpha = float(call.number("alpha"))
    return broadcast(call, operand.name, alpha if operand.name == "other" else 1.0)


@rule(aten.sub.Tensor)
def sub(call: Call, operand: Operand) -> Form:
    """y = a − α b."""
    alpha = float(call.number("alpha"))
    return broadcast(call, operand.name, -alpha if operand.name == "other" else 1.0)
