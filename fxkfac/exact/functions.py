"""Derivatives of any tensor-to-tensor function as matrices, in both flattening orders.

Paper, Definitions 3-10 and 12-15: Jacobians, Hessians and linearisation, rvec and cvec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxkfac.errors import OptionError, UnsupportedUse
from fxkfac.isolation import missing_derivatives, require_gradients_on
from fxkfac.linalg import cvec, rvec

FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {"rvec": rvec, "cvec": cvec}


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor, vec: str = "rvec") -> Tensor:
    """The matrix J[i, j] = ∂[vec f(x)]_i / ∂[vec x]_j, [dim f, dim x]. Paper, Definitions 7 and 8.

    The rvec one, reshaped to (*f.shape, *x.shape), is the general Jacobian of Definition 4.

    Args:
        f: A function from a tensor to a tensor, of whatever shapes.
        x: Where.
        vec: `"rvec"` (row-major) or `"cvec"` (column-major), of both.

    Raises:
        OptionError: There is no such `vec`.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        out = f(at)
        J = jacobian_rows(out, [at])
    return J[order([out.shape], vec)][:, order([x.shape], vec)]


def hessian_matrix(f: Callable[[Tensor], Tensor], x: Tensor, vec: str = "rvec") -> Tensor:
    """The matrix of second derivatives, [dim x, dim x]. Paper, Definitions 12 and 13.

    The rvec one, reshaped to (*x.shape, *x.shape), is the general Hessian of Definition 10.

    Args:
        f: A function from a tensor to a scalar.
        x, vec: As of `fxkfac.exact.jacobian`.

    Raises:
        OptionError: There is no such `vec`.
    """
    return jacobian(torch.func.grad(f), x, vec)


def linearize(f: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """h̄(x) = f(x₀) + J(x₀) (x - x₀), a function of x that may be differentiated further.

    Paper, Definitions 14 and 15. The Hessian of g ∘ h̄ at x₀ is the GGN of g ∘ f (Definition 17).

    Args:
        f: A function of one tensor, or of a dict, list or tuple of tensors.
        at: The anchor x₀.
    """

    def linear(x: Any) -> Any:
        shift = tree_map(torch.sub, x, at)
        at_anchor = torch.func.jvp(f, (at,), (shift,))  # f(x₀) and J (x - x₀)
        return tree_map(torch.add, at_anchor[0], at_anchor[1])

    return linear


def jacobian_rows(out: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """[dim out, Σ dim inputs], both in rvec order, from a computed `out`: one VJP for each row."""
    rows = [out.new_zeros(0, sum(t.numel() for t in inputs))]  # there may be no others
    for i in range(out.numel()):
        e = out.new_zeros(out.shape)
        e.view(-1)[i] = 1
        rows.append(torch.cat([rvec(g) for g in vjp(out, inputs, e)]).unsqueeze(0))
    return torch.cat(rows)


def vjp(
    out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Jᵀ u for a computed `out`; zeros where it does not depend on an input. Definition 5."""
    require_gradients_on()  # or else nothing would depend on anything
    if not out.requires_grad:
        return tuple(torch.zeros_like(t) for t in inputs)
    with missing_derivatives(_without_derivative):
        return torch.autograd.grad(
            out,
            inputs,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )


def _without_derivative(message: str) -> UnsupportedUse:
    return UnsupportedUse(
        f"{message}; expected ops whose backward pass has a derivative in PyTorch. Build model and "
        "loss of others, as of nn.Embedding and a sum in the place of nn.EmbeddingBag."
    )


def jvp(out: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """J v for a computed `out`: Jᵀ u is linear in u, and its VJP in u is J. Definition 6.

    Raises `UnsupportedUse` where PyTorch has no derivative of an op's backward pass.
    """
    u = torch.zeros_like(out, requires_grad=True)
    pulled = vjp(out, inputs, u, create_graph=True)
    paired = torch.stack([(p * t).sum() for p, t in zip(pulled, tangents, strict=True)]).sum()
    return vjp(paired, [u], torch.ones_like(paired))[0]


def order(shapes: Sequence[torch.Size], vec: str) -> Tensor:
    """Where each entry of the concatenated `vec` vectors stands in the rvec ones."""
    flatten = require_vec(vec)
    positions, start = [torch.zeros(0, dtype=torch.int64, device="cpu")], 0
    for shape in shapes:
        size = shape.numel()
        positions.append(start + flatten(torch.arange(size, device="cpu").reshape(shape)))
        start += size
    return torch.cat(positions)


def require_vec(vec: str) -> Callable[[Tensor], Tensor]:
    """The flattening of that name. Raises `OptionError`."""
    if vec not in FLATTENINGS:
        raise OptionError(f"vec is {vec!r}; expected 'rvec' (row-major) or 'cvec' (column-major).")
    return FLATTENINGS[vec]
