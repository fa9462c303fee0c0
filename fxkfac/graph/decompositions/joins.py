"""Parameters that meet data without a product: each one is added to zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition

aten = torch.ops.aten


@decomposition(aten.cat.default, aten.stack.default)
def join(at: Rewriter) -> Node | None:
    """Parameters between data in a `cat` or `stack`: each one is added to zeros."""
    tensors = list(at["tensors"])
    own = [k for k, t in enumerate(tensors) if at.is_parameter(t)]
    if not own or len(own) == len(tensors):
        return None
    for k in own:
        zeros = at.call(aten.zeros_like.default, tensors[k])
        tensors[k] = at.call(aten.add.Tensor, zeros, tensors[k])
    return at.call(at.node.target, tensors, *at.node.args[1:], **at.node.kwargs)


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
