"""Parameters that meet data without a product: each one is added to zeros."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition
from fxkfac.graph.dependence import length

aten = torch.ops.aten


@decomposition(aten.cat.default, aten.stack.default)
def join(at: Rewriter) -> Node | None:
    """Parameters between data in a `cat` or `stack`: each one is added to zeros."""
    tensors = list(at["tensors"])
    own = [k for k, t in enumerate(tensors) if at.is_parameter(t)]
    if not own or len(own) == len(tensors) or at.is_parameter(at.node):
        return None
    for k in own:
        zeros = at.call(aten.zeros_like.default, tensors[k])
        tensors[k] = at.call(aten.add.Tensor, zeros, tensors[k])
    return at.call(at.node.target, tensors, *at.node.args[1:], **at.node.kwargs)


@decomposition(aten.linear.default)
def linear(at: Rewriter) -> Node | None:
    """A bias of which parts are constants, as where keys have none, is added by itself."""
    if not _has_constants(at, at["bias"]):
        return None
    return _added_by_parts(at, at.without("bias"), at["bias"], -1)


@decomposition(aten.addmm.default)
def addmm(at: Rewriter) -> Node | None:
    """The same in another spelling."""
    scaled = (at["alpha"] or 1, at["beta"] or 1) != (1, 1)
    if scaled or not _has_constants(at, at["self"]):
        return None
    return _added_by_parts(at, at.call(aten.mm.default, at["mat1"], at["mat2"]), at["self"], -1)


@decomposition(aten.add.Tensor)
def add(at: Rewriter) -> Node | None:
    """A table of which parts are constants, as where a class token has no position."""
    for one, other in (("self", "other"), ("other", "self")):
        if at["alpha"] in (None, 1) and _has_constants(at, at[one]):
            shape, spread = (at[name].meta["val"].shape for name in (one, other))
            axis = _axis(at[one]) % len(shape) - len(shape)  # from the last one back
            if len(spread) >= -axis and spread[axis] == shape[axis]:
                return _added_by_parts(at, at[other], at[one], axis)
    return None


def _has_constants(at: Rewriter, value: Any) -> bool:
    """Whether an argument joins parameters and constants."""
    is_join = at.is_parameter(value) and value.target is aten.cat.default
    return is_join and any(at.is_constant(t) for t in value.args[0])


def _axis(joined: Node) -> int:
    axis: Any = joined.args[1] if len(joined.args) > 1 else joined.kwargs.get("dim", 0)
    return axis


def _added_by_parts(at: Rewriter, y: Node, joined: Node, axis: int) -> Node:
    """Add each of the tensors that are joined to the part of y that it meets."""
    parts, start = list[Node](), 0
    tensors: Any = joined.args[0]
    for tensor in tensors:
        end: Any = at.call(length, tensor, axis)  # constants do not tell before they run
        end = at.call(operator.add, start, end) if parts else end
        part = at.call(aten.slice.Tensor, y, axis, start, end)
        parts.append(at.call(aten.add.Tensor, part, tensor))
        start = end
    return at.call(aten.cat.default, parts, axis)


@decomposition(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar
)
def where(at: Rewriter) -> Node | None:
    """A parameter that stands where a condition of the data holds, as a mask token does.

    Or where a number does not stand, as in a bias of the attention that is masked.
    """
    names = [n for n in ("self", "other") if at.is_parameter(at[n])]
    if len(names) != 1:
        return None
    plain = at.replaced(names[0], at.call(aten.zeros_like.default, at[names[0]]))
    zeros = at.call(aten.zeros_like.default, plain)
    return at.replaced(names[0], at.call(aten.add.Tensor, zeros, at[names[0]]))


@decomposition(aten.scaled_dot_product_attention.default)
def attention(at: Rewriter) -> Node | None:
    """A mask that is made of parameters, as a relative position bias is, is added to the scores."""
    mask = at["attn_mask"]
    if not at.is_parameter(mask) or not mask.meta["val"].is_floating_point():
        return None
    if mask.meta["val"].shape[:-2] == at["query"].meta["val"].shape[:-2]:
        return None  # each datum has its own already
    zeros = at.call(no_scores, at["query"], at["key"])
    return at.replaced("attn_mask", at.call(aten.add.Tensor, zeros, mask))


def no_scores(query: Tensor, key: Tensor) -> Tensor:
    """Zeros in the shape of an attention's scores."""
    return query.new_zeros(*query.shape[:-1], key.shape[-2])
