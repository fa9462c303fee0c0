"""The forward Laplacian: value, slopes, summed second derivatives, in one pass through a function.

A `Jet` stands in the place of a tensor (N, ...) and holds D + 2 streams of that shape along one
leading axis: the value, its derivative along each of the D axes, and Σ_d w_d ∂²/∂x_d². Only that
sum is carried, as every rule is linear in it. As the streams share a tensor, a weight meets all of
them in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxkfac.errors import DataError, OptionError, UnsupportedUse
from fxkfac.taylor import elementwise, layout, products
from fxkfac.taylor.jet import RULES, Jet, constant

RULES.update(elementwise.RULES | layout.RULES | products.RULES)


class Taylor(NamedTuple):
    """What `laplacian` returns: (N, *out), (D, N, *out) and (N, *out)."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


def laplacian(
    function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor | None = None
) -> Taylor:
    """Value, derivatives and Σ_d weights[d] ∂²f/∂x_d² of a function, at N points at once.

    Args:
        function: A module or function from points (N, D) to (N, *out), made of torch ops. Each row
            of its result must depend on the same row of x alone; batch norm does not fit. `sum`
            and its kin over the rows are refused; other ways to mix them, such as `z - z[0]` or
            a matrix product over the rows, are not seen.
        x: Points (N, D).
        weights: (D,), one for each axis; default: ones, the plain Laplacian. For the heat equation
            put zero on time, and read ∂f/∂t from the gradient.

    Returns:
        The value (N, *out), the gradient (D, N, *out) and the weighted Laplacian (N, *out).

    Raises:
        UnsupportedUse: The function calls an op that has no rule here, or sums over the data.
        DataError: x is no floating point tensor (N, D).
        OptionError: The weights are not (D,).
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise DataError(
            f"x is {_described(x)}; expected points as a floating point tensor of shape (N, D)."
        )
    N, D = x.shape
    if weights is not None and not (isinstance(weights, Tensor) and weights.shape == (D,)):
        raise OptionError(
            f"weights are {_described(weights)}; expected a tensor of shape ({D},), x's axes."
        )
    axes = torch.eye(D, dtype=x.dtype, device=x.device).unsqueeze(1).expand(D, N, D)
    start = Jet(torch.cat([x[None], axes, torch.zeros_like(x)[None]]), weights)
    out: Any = function(start)  # type: ignore[arg-type]
    if isinstance(out, Tensor):
        out = constant(out, start)
    if not isinstance(out, Jet) or out.ndim == 0 or out.shape[0] != N:
        raise UnsupportedUse(
            f"the function makes {_described(out)} of points {tuple(x.shape)}; expected one tensor "
            f"with a row for each point, of shape ({N}, ...). Do not sum over the data inside."
        )
    # Joined, so that a gradient comes back, of zero, to what moves the value alone.
    value, slopes, second = out.like(out.streams).parts
    return Taylor(value.squeeze(0), slopes, second.squeeze(0))


def _described(found: Any) -> str:
    shape = getattr(found, "shape", None)
    kind = "a tensor" if isinstance(found, Tensor | Jet) else type(found).__name__
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"
