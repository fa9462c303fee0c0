"""Elementwise products: every axis that both have is a group axis, with one in and one out."""

from __future__ import annotations

import math

import torch

from fxkfac.graph.form import Form
from fxkfac.graph.rules.products import aligned, broadcast, rows
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten


@rule(aten.mul.Tensor)
def mul(call: Call, operand: Operand) -> Form:
    """y = a ∘ b, broadcast: an axis of the parameter alone is an out axis."""
    other = "other" if operand.name == "self" else "self"
    if call.args[other] is call.args[operand.name]:
        raise NotLinear("the parameter is multiplied by itself")
    return product(call, operand.name, other)


@rule(aten.addcmul.default)
def addcmul(call: Call, operand: Operand) -> Form:
    """y = c + α a ∘ b."""
    if operand.name == "self":
        return broadcast(call, "self")
    other = "tensor2" if operand.name == "tensor1" else "tensor1"
    return product(call, operand.name, other, float(call.number("value")))


def product(call: Call, weight: str, x: str, scale: float = 1.0) -> Form:
    """The product of two operands that broadcast to the output; one number scales all of it."""
    y, shape = rows(len(call.y_shape)), call.shape(weight)
    axes = " ".join("1" for _ in shape) if math.prod(shape) == 1 else aligned(call, weight)
    return Form(axes, aligned(call, x), y, call.args[x], scale=scale)
