"""Parameters that meet data without a product: each one is added to zeros."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition
from fxkfac.graph.dependence import length
from fxkfac.graph.overloads import arguments

aten = torch.ops.aten

BIASED = {aten.linear.default: "bias", aten.addmm.default: "self"}  # what is added to the product


@decomposition(aten.cat.default, aten.stack.default)
def join(at: Rewriter) -> Node | None:
    """Parameters between data in a `cat` or `stack`: each one is added to zeros."""
    tensors = list(at["tensors"])
    own = [k for k, t in enumerate(tensors) if at.is_parameter(t)]
    if not own or len(own) == len(tensors) or _is_added(at):
        return None
    for k in own:
        zeros = at.call(aten.zeros_like.default, tensors[k])
        tensors[k] = at.call(aten.add.Tensor, zeros, tensors[k])
    return at.call(at.node.target, tensors, *at.node.args[1:], **at.node.kwargs)


@decomposition(aten.copy.default)
def copied(at: Rewriter) -> Node | None:
    """`h[:, 0] = token`: what is written is added to zeros in the shape of what was there."""
    old, new = at["self"], at["src"]
    if not at.is_parameter(new) or at.is_parameter(old) or not _is_one_dtype(old, new):
        return None
    return at.call(aten.add.Tensor, at.call(aten.zeros_like.default, old), new)


@decomposition(aten.select_scatter.default, aten.slice_scatter.default)
def scattered(at: Rewriter) -> Node | None:
    """The same where it is written by a function that leaves what was there."""
    new = at["src"]
    if not at.is_parameter(new) or at.is_parameter(at["self"]):
        return None
    zeros = at.call(aten.zeros_like.default, new)
    return at.replaced("src", at.call(aten.add.Tensor, zeros, new))


def _is_one_dtype(*nodes: Node) -> bool:
    dtypes = {getattr(node.meta.get("val"), "dtype", None) for node in nodes}
    return len(dtypes) == 1 and None not in dtypes


def _is_added(at: Rewriter) -> bool:
    """Whether parameters and constants, without data, are joined and then added to something."""
    constant = at.is_parameter(at.node) and at.node.target is aten.cat.default
    return constant and all(_axis_added(at.node, user) is not None for user in at.node.users)


@decomposition(aten.linear.default, aten.addmm.default, aten.add.Tensor)
def added(at: Rewriter) -> Node | None:
    """A bias or table of which parts are constants: each part is added by itself.

    So it is where keys have no bias, or a class token no position.
    """
    for joined in at.node.all_input_nodes:
        if at.is_parameter(joined) and joined.target is aten.cat.default:
            tensors: Any = joined.args[0]
            axis = _axis_added(joined, at.node)
            if axis is not None and not all(map(at.is_parameter, tensors)):
                return _added_by_parts(at, _rest(at, joined), tensors, axis)
    return None


def _axis_added(joined: Node, user: Node) -> int | None:
    """Along which axis, from the last one back, tensors are joined that a reader adds as such."""
    given = arguments(user) if user.target in (*BIASED, aten.add.Tensor) else {}
    if any(given.get(name) not in (None, 1) for name in ("alpha", "beta")):
        return None
    if user.target in BIASED:
        return -1 if given[BIASED[user.target]] is joined else None
    both = [given.get(name) for name in ("self", "other")]
    others = [node for node in both if isinstance(node, Node) and node is not joined]
    table, *values = (node.meta.get("val") for node in (joined, *others))
    if table is None or len(values) != 1 or values[0] is None:
        return None
    axis: Any = joined.args[1] if len(joined.args) > 1 else joined.kwargs.get("dim", 0)
    axis = axis % table.ndim - table.ndim
    fits = values[0].ndim >= -axis and values[0].shape[axis] == table.shape[axis]
    return axis if fits else None


def _rest(at: Rewriter, joined: Node) -> Node:
    """What a bias or table is added to."""
    if at.node.target is aten.addmm.default:
        return at.call(aten.mm.default, at["mat1"], at["mat2"])
    if at.node.target is aten.linear.default:
        return at.without("bias")
    (other,) = (node for node in (at["self"], at["other"]) if node is not joined)
    return other


def _added_by_parts(at: Rewriter, y: Node, tensors: Iterable[Node], axis: int) -> Node:
    """Add each of the tensors that are joined to the part of y that it meets."""
    parts, start = list[Node](), 0
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


@decomposition(aten.index_put.default)
def masked(at: Rewriter) -> Node | None:
    """`h[mask] = token`: the same by `where`, if all rows that a mask selects get one value."""
    masks = [index for index in at["indices"] if index is not None]
    known = [n.meta.get("val") for n in (at["self"], at["values"], masks[0])]
    if at["accumulate"] or len(masks) > 1 or any(value is None for value in known):
        return None
    if at.is_parameter(at.node):  # what parameters alone are put together of is a view of them
        return None
    rows, values, mask = known
    inside = rows.ndim - at["indices"].index(masks[0]) - mask.ndim  # axes of a selected row
    if mask.dtype != torch.bool or values.ndim > inside:
        return None
    over_rows = masks[0]
    for _ in range(inside):
        over_rows = at.call(aten.unsqueeze.default, over_rows, -1)
    chosen = at.call(aten.where.self, over_rows, at["values"], at["self"])
    return where(Rewriter(at.graph, chosen, at.own)) or chosen


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
