"""Products of more than two tensors: the others are put together first."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxkfac.graph.decompositions.rewriter import Rewriter, decomposition

aten = torch.ops.aten


@decomposition(aten.bilinear.default)
def bilinear(at: Rewriter) -> Node | None:
    """y_o = Σ_ij W_oij x_i z_j + b_o: linear in the outer product of the two inputs."""
    outer = at.call(aten.einsum.default, "...i,...j->...ij", [at["input1"], at["input2"]])
    weight = at.call(aten.flatten.using_ints, at["weight"], 1, 2)
    return at.call(
        aten.linear.default, at.call(aten.flatten.using_ints, outer, -2, -1), weight, at["bias"]
    )


@decomposition(aten.einsum.default)
def einsum(at: Rewriter) -> Node | None:
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
