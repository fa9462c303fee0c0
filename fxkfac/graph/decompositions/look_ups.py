"""Look-ups: bags of rows, and several indices at once."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition

aten = torch.ops.aten


@decomposition(
    aten.embedding_bag.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default
)
def embedding_bag(at: Rewriter) -> Node | None:
    """The sum or mean over a bag of looked-up rows is an embedding, then an addition by index."""
    indices, offsets, mode = at["indices"], at["offsets"], at["mode"]
    ignored = at["padding_idx"]
    if mode == 2 or (ignored is not None and ignored >= 0):
        return None
    if at["include_last_offset"]:  # where the last bag ends
        offsets = at.call(aten.slice.Tensor, offsets, 0, 0, -1)
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


@decomposition(aten.index.Tensor)
def index(at: Rewriter) -> Node | None:
    """W[i, j] = W'[i · m + j], with the axes that are indexed in one."""
    indices = list(at["indices"])
    given = [k for k, i in enumerate(indices) if i is not None]
    if not at.is_parameter(at["self"]) or len(given) < 2 or given[-1] - given[0] >= len(given):
        return None
    shape = at["self"].meta["val"].shape
    if any(indices[k].meta["val"].dtype == torch.bool for k in given):
        return None
    # -1 is the last one, of its own axis.
    counted = {k: at.call(aten.remainder.Scalar, indices[k], shape[k]) for k in given}
    place = counted[given[0]]
    for k in given[1:]:
        place = at.call(aten.add.Tensor, at.call(aten.mul.Tensor, place, shape[k]), counted[k])
    flat = at.call(aten.flatten.using_ints, at["self"], given[0], given[-1])
    return at.call(aten.index.Tensor, flat, [*[None] * given[0], place])
