"""Embeddings: the input of the einsum is the one-hot encoding of the indices."""

from __future__ import annotations

import torch

from fxkfac.graph.ir import Form, OneHot
from fxkfac.graph.rules.products import rows
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call, operand: Operand) -> Form:
    """y[rows, d] = Σ_v onehot[rows, v] · W[v, d]."""
    if operand.name != "weight":
        raise NotLinear("the parameter holds the indices")
    r = rows(call.ndim("indices"))
    padding = int(call.number("padding_idx"))
    # PyTorch stops the gradient of the padding row: to the weight, that index is no input.
    one_hot = OneHot(call.shape("weight")[0], ignored=padding if padding >= 0 else None)
    return Form("v d", f"{r} v", f"{r} d", call.args["indices"], one_hot)
