"""Ops that do two things with a parameter -> the same ops apart, so that each has a rule.

A norm normalises, then scales and shifts: as `norm(x) · w + b` the scale is a product and the
shift an addition, whichever norm it was. A parameter that meets data in `cat`, `where` or the mask
of an attention is an addition to zeros, whose output has the gradient of every datum.

Requires: a rebuilt graph. Result: the same function, with more and simpler nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxkfac.graph.dependence import depend_on

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


def decompose(graph: Graph, held: Sequence[Node], inputs: Sequence[Node]) -> None:
    """Rewrite in place every node of an op in `DECOMPOSITIONS`.

    Args:
        graph: The graph.
        held: The placeholders of the parameters.
        inputs: The placeholders of the data.
    """
    own = depend_on(graph, held) - depend_on(graph, inputs)
    for node in list(graph.nodes):
        rewrite = DECOMPOSITIONS.get(node.target)
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            result = rewrite(_Rewriter(graph, node, own))
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    graph.lint()


class _Rewriter:
    """The node that is rewritten, its arguments by name, and a way to write ops in its place."""

    def __init__(self, graph: Graph, node: Node, own: set[Node]) -> None:
        assert isinstance(node.target, OpOverload)
        self.graph, self.node, self.own = graph, node, own
        self.schema = node.target._schema

    def __getitem__(self, name: str) -> Any:
        for place, argument in enumerate(self.schema.arguments):
            if argument.name == name:
                if place < len(self.node.args):
                    return self.node.args[place]
                return self.node.kwargs.get(name, argument.default_value)
        return None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One more op; it comes from the same line of the user's code."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
        return made

    def without(self, *names: str) -> Node:
        """The same op with these arguments left out."""
        return self._again(dict.fromkeys(names))

    def replaced(self, name: str, value: Node) -> Node:
        """The same op with another value for one argument."""
        return self._again({name: value})

    def _again(self, other: Mapping[str, Any]) -> Node:
        values = {a.name: other.get(a.name, self[a.name]) for a in self.schema.arguments}
        named = {a.name: values.pop(a.name) for a in self.schema.arguments if a.kwarg_only}
        return self.call(self.node.target, *values.values(), **named)

    def is_parameter(self, value: Any) -> bool:
        """Whether an argument is made of parameters, and not of data."""
        return value in self.own


Rewrite = Callable[[_Rewriter], Node | None]


def _norm(at: _Rewriter) -> Node | None:
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


def _scaled(at: _Rewriter, x: Node, weight: Node | None, bias: Node | None) -> Node:
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


def _prelu(at: _Rewriter) -> Node | None:
    """prelu(x; w) = x where x > 0, else w · x."""
    x, weight = at["self"], at["weight"]
    per_channel = at.node.target is aten.prelu.default and weight.meta["val"].numel() > 1
    moved = at.call(aten.movedim.int, x, 1, -1) if per_channel else x
    scaled = at.call(aten.mul.Tensor, moved, weight)
    if per_channel:
        scaled = at.call(aten.movedim.int, scaled, -1, 1)
    return at.call(aten.where.self, at.call(aten.gt.Scalar, x, 0), x, scaled)


def _bilinear(at: _Rewriter) -> Node | None:
    """y_o = Σ_ij W_oij x_i z_j + b_o: linear in the outer product of the two inputs."""
    outer = at.call(aten.einsum.default, "...i,...j->...ij", [at["input1"], at["input2"]])
    weight = at.call(aten.flatten.using_ints, at["weight"], 1, 2)
    return at.call(
        aten.linear.default, at.call(aten.flatten.using_ints, outer, -2, -1), weight, at["bias"]
    )


def _einsum(at: _Rewriter) -> Node | None:
    """An einsum of one parameter and several other tensors: these are put together first."""
    tensors, equation = list(at["tensors"]), at["equation"].replace(" ", "")
    own = [k for k, t in enumerate(tensors) if at.is_parameter(t)]
    if len(tensors) < 3 or len(own) != 1 or "." in equation or "->" not in equation:
        return None
    left, out = equation.split("->")
    terms = left.split(",")
    weight, rest = terms[own[0]], [t for k, t in enumerate(terms) if k != own[0]]
    kept = "".join(dict.fromkeys(c for t in rest for c in t if c in weight or c in out))
    others = [t for k, t in enumerate(tensors) if k != own[0]]
    x = at.call(aten.einsum.default, f"{','.join(rest)}->{kept}", others)
    return at.call(aten.einsum.default, f"{kept},{weight}->{out}", [x, tensors[own[0]]])


def _embedding_bag(at: _Rewriter) -> Node | None:
    """The sum or mean over a bag of looked-up rows is an embedding, then an addition by index."""
    indices, offsets, mode = at["indices"], at["offsets"], at["mode"]
    ignored = at["padding_idx"]
    if mode == 2 or at["include_last_offset"] or (ignored is not None and ignored >= 0):
        return None
    rows = at.call(aten.embedding.default, at["weight"], indices)
    if at["per_sample_weights"] is not None:
        weights = at.call(aten.unsqueeze.default, at["per_sample_weights"], -1)
        rows = at.call(aten.mul.Tensor, rows, weights)
    pooled = at.call(bags, rows, offsets, mode == 1)
    for user in list(at.node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(pooled)
            at.graph.erase_node(user)
    return None if at.node.users else pooled


def bags(rows: Tensor, offsets: Tensor, mean: bool) -> Tensor:
    """Sum or mean of the rows of every bag, which begins at its offset."""
    places = torch.arange(rows.shape[0], device=rows.device)
    bag = torch.searchsorted(offsets, places, right=True) - 1
    total = rows.new_zeros(offsets.shape[0], rows.shape[1]).index_add(0, bag, rows)
    if not mean:
        return total
    counts = rows.new_zeros(offsets.shape[0]).index_add(0, bag, torch.ones_like(rows[:, 0]))
    return total / counts.clamp_min(1).unsqueeze(-1)


def _join(at: _Rewriter) -> Node | None:
    """Parameters between data in a `cat` or `stack`: each one is added to zeros."""
    tensors = list(at["tensors"])
    own = [k for k, t in enumerate(tensors) if at.is_parameter(t)]
    if not own or len(own) == len(tensors):
        return None
    for k in own:
        zeros = at.call(aten.zeros_like.default, tensors[k])
        tensors[k] = at.call(aten.add.Tensor, zeros, tensors[k])
    return at.call(at.node.target, tensors, *at.node.args[1:], **at.node.kwargs)


def _where(at: _Rewriter) -> Node | None:
    """A parameter that stands where a condition of the data holds, as a mask token does.

    Or where a number does not stand, as in a bias of the attention that is masked.
    """
    names = [n for n in ("self", "other") if at.is_parameter(at[n])]
    if len(names) != 1:
        return None
    plain = at.replaced(names[0], at.call(aten.zeros_like.default, at[names[0]]))
    zeros = at.call(aten.zeros_like.default, plain)
    return at.replaced(names[0], at.call(aten.add.Tensor, zeros, at[names[0]]))


def _attention(at: _Rewriter) -> Node | None:
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


DECOMPOSITIONS: dict[Any, Rewrite] = {
    **dict.fromkeys(LAST | CHANNELS, _norm),
    aten.prelu.default: _prelu,
    aten._prelu_kernel.default: _prelu,
    aten.bilinear.default: _bilinear,
    aten.einsum.default: _einsum,
    aten.embedding_bag.default: _embedding_bag,
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten._embedding_bag.default: _embedding_bag,
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.masked_fill.Scalar: _where,
    aten.scaled_dot_product_attention.default: _attention,
}
