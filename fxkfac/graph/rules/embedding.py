"""Look-ups: the input of the einsum is the one-hot encoding of the indices."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxkfac.graph.form import Form, OneHot
from fxkfac.graph.rules.products import rows
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call, operand: Operand) -> Form:
    """y[rows, d] = Σ_v onehot[rows, v] · W[v, d]."""
    if operand.name != "weight":
        raise NotLinear("the parameter holds the indices")
    padding = int(call.number("padding_idx"))
    # PyTorch stops the gradient of the padding row: to the weight, that index is no input.
    one_hot = OneHot(call.shape("weight")[0], ignored=padding if padding >= 0 else None)
    r = rows(call.ndim("indices"))
    return Form("v d", f"{r} v", f"{r} d", call.args["indices"], one_hot)


@rule(aten.index_select.default)
def index_select(call: Call, operand: Operand) -> Form:
    """y[d.., rows, e..] = Σ_v onehot[rows, v] · W[d.., v, e..]."""
    return look_up(call, call.args["index"], int(call.number("dim")) % call.ndim("self"))


@rule(aten.index.Tensor)
def index(call: Call, operand: Operand) -> Form:
    """`W[i]` or `W[:, i]`, with one tensor of whole numbers."""
    given = [(k, i) for k, i in enumerate(call.args["indices"]) if i is not None]
    if operand.name != "self":
        raise NotLinear("the parameter holds the indices")
    if len(given) != 1:
        raise NotLinear(f"an index of {len(given)} tensors; look up one axis at a time")
    axis, indices = given[0]
    if (value := indices.meta.get("val")) is not None and value.dtype == torch.bool:
        raise NotLinear("the index is a mask; multiply by it instead")
    return look_up(call, indices, axis)


def look_up(call: Call, indices: Node, axis: int) -> Form:
    """Entries along one axis, by their numbers."""
    shape = call.shape("self")
    r = rows(len(call.shapes[indices]))
    weight = [f"d{k}" for k in range(len(shape))]
    weight[axis] = "v"
    y = [r if a == "v" else a for a in weight]
    return Form(" ".join(weight), f"{r} v", " ".join(y), indices, OneHot(shape[axis]))
