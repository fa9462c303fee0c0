"""Elementwise ops: slopes, interpolations, quotients."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition

aten = torch.ops.aten


@decomposition(aten.prelu.default, aten._prelu_kernel.default)
def prelu(at: Rewriter) -> Node | None:
    """prelu(x; w) = x where x > 0, else w · x."""
    x, weight = at["self"], at["weight"]
    per_channel = at.node.target is aten.prelu.default and weight.meta["val"].numel() > 1
    moved = at.call(aten.movedim.int, x, 1, -1) if per_channel else x
    scaled = at.call(aten.mul.Tensor, moved, weight)
    if per_channel:
        scaled = at.call(aten.movedim.int, scaled, -1, 1)
    return at.call(aten.where.self, at.call(aten.gt.Scalar, x, 0), x, scaled)


@decomposition(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(at: Rewriter) -> Node:
    """lerp(a, b; w) = a + w · (b − a)."""
    start, end, weight = at["self"], at["end"], at["weight"]
    way = at.call(aten.sub.Tensor, end, start)
    return at.call(aten.add.Tensor, start, at.call(aten.mul.Tensor, way, weight))


@decomposition(aten.rsub.Tensor)
def rsub(at: Rewriter) -> Node:
    """rsub(a, b) = b − α a."""
    return at.call(aten.sub.Tensor, at["other"], at["self"], alpha=at["alpha"])


@decomposition(aten.addcdiv.default)
def addcdiv(at: Rewriter) -> Node | None:
    """c + α a / b, with a parameter c or a."""
    if at.is_parameter(at["tensor2"]):
        return None
    product = at.call(
        aten.mul.Tensor, at["tensor1"], at.call(aten.reciprocal.default, at["tensor2"])
    )
    return at.call(aten.add.Tensor, at["self"], product, alpha=at["value"])


@decomposition(aten.div.Tensor)
def div(at: Rewriter) -> Node | None:
    """w / x = w · (1 / x), for a parameter w and data x."""
    w, x = at["self"], at["other"]
    if not at.is_parameter(w) or at.is_parameter(x) or not isinstance(x, Node):
        return None
    return at.call(aten.mul.Tensor, w, at.call(aten.reciprocal.default, x))
