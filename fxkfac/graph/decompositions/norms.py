"""Norms: normalise, then scale and shift."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition

aten = torch.ops.aten

# Norms whose weight lies along the last axes, and those whose weight lies along the channels.
LAST = {
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
}
CHANNELS = {
    aten.group_norm.default,
    aten.native_group_norm.default,
    aten.instance_norm.default,
    aten.batch_norm.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
    aten._batch_norm_with_update_functional.default,
}
FIXED = {  # batch norms that may take their statistics from buffers
    aten.batch_norm.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
}


@decomposition(*LAST, *CHANNELS)
def norm(at: Rewriter) -> Node | None:
    """norm(x; w, b) = norm(x) · w + b."""
    weight, bias = at["weight"], at["bias"]
    if weight is None and bias is None:
        return None
    plain = at.without("weight", "bias")
    if len(at.schema.returns) == 1:
        return _scaled(at, plain, weight, bias)
    for user in list(at.node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            with at.graph.inserting_before(user):
                first = at.call(operator.getitem, plain, 0)
                user.replace_all_uses_with(_scaled(at, first, weight, bias))
            at.graph.erase_node(user)
    return plain


def fix_statistics(node: Node) -> None:
    """Rewrite a batch norm in eval mode as one scale and one shift of the channels.

    It is what its kernel computes; but autograd keeps the input of the kernel, and not that of a
    product with a scale that asks for no gradient.
    """
    if node.target not in FIXED or not _is_one_dtype(node):
        return
    at = Rewriter(node.graph, node, set())
    outputs = [node] if len(at.schema.returns) == 1 else list(node.users)
    if at["training"] or any(u.args[1] != 0 for u in outputs if u is not node):
        return
    with node.graph.inserting_before(node):
        result = _affine(at)
    for output in outputs:
        output.replace_all_uses_with(result)
        node.graph.erase_node(output)
    if node not in outputs:
        node.graph.erase_node(node)


def _affine(at: Rewriter) -> Node:
    """shift + x · scale, with scale = w / √(variance + ε) and shift = b - mean · scale."""
    scale = at.call(aten.rsqrt.default, at.call(aten.add.Tensor, at["running_var"], at["eps"]))
    if at["weight"] is not None:
        scale = at.call(aten.mul.Tensor, scale, at["weight"])
    mean, bias = at["running_mean"], at["bias"]
    if bias is None:
        shift = at.call(aten.neg.default, at.call(aten.mul.Tensor, mean, scale))
    else:
        shift = at.call(aten.addcmul.default, bias, mean, scale, value=-1)
    x = at["input"]
    channels = [-1, *[1] * (x.meta["val"].ndim - 2)]
    shift, scale = (at.call(aten.reshape.default, v, channels) for v in (shift, scale))
    return at.call(aten.addcmul.default, shift, x, scale)


def _is_one_dtype(node: Node) -> bool:
    """Whether data, statistics, scale and shift are known to have the same dtype."""
    dtypes = {_dtype(n, 0) for n in node.all_input_nodes}
    return len(dtypes) == 1 and None not in dtypes


def _scaled(at: Rewriter, x: Node, weight: Node | None, bias: Node | None) -> Node:
    channels = at.node.target in CHANNELS
    if channels:
        x = at.call(aten.movedim.int, x, 1, -1)
    if weight is not None:
        x = at.call(aten.mul.Tensor, x, weight)
    if bias is not None:
        x = at.call(aten.add.Tensor, x, bias)
    dtypes = {_dtype(at.node, 0), *(_dtype(p, 0) for p in (weight, bias) if p is not None)}
    if len(dtypes - {None}) > 1:  # half-precision data, float32 scale: as the norm, so the product
        x = at.call(aten._to_copy.default, x, dtype=_dtype(at.node, 0))
    return at.call(aten.movedim.int, x, -1, 1) if channels else x


def _dtype(node: Node, place: int) -> torch.dtype | None:
    value = node.meta.get("val")
    value = value[place] if isinstance(value, tuple | list) else value
    return value.dtype if isinstance(value, Tensor) else None
