"""Elementwise products: every axis that both have is a group axis, with one in and one out."""

from __future__ import annotations

import torch

from fxkfac.graph.ir import Form
from fxkfac.graph.rules.products import broadcast
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
    """The product of two operands that broadcast to the output."""
    y = [f"r{k}" for k in range(len(call.y_shape))]
    axes = [_axes(call, name, y) for name in (weight, x)]
    return Form(axes[0], axes[1], " ".join(y), call.args[x], scale=scale)


def _axes(call: Call, name: str, y: list[str]) -> str:
    shape = call.shape(name)
    own = len(y) - len(shape)
    aligned = zip(y[own:], call.y_shape[own:], shape, strict=True)
    return " ".join(a if n == m else "1" for a, m, n in aligned)
