"""Functions that act on each entry alone, with their first and second derivatives.

The common ones in closed form, which every front end can record and which costs one evaluation; all
others by nested `torch.func.jvp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from fxkfac.taylor.jet import Jet, lift, refuse, weighted

Derivatives = tuple[Tensor, Tensor, Tensor | None]  # f, f′, f″; `None` for f″ = 0


def elementwise(func: Callable[..., Tensor], jet: Any, *args: Any, **kwargs: Any) -> Jet:
    """∂f(u) = f′(u)·∂u, and Σ_d w_d ∂²_d f(u) = f′(u)·Σ_d w_d ∂²_d u + f″(u)·Σ_d w_d (∂_d u)²."""
    if not isinstance(jet, Jet) or any(isinstance(a, Jet) for a in (*args, *kwargs.values())):
        refuse(f"{func.__name__} with a second argument that depends on x")
    derivatives: Callable[..., Derivatives] = CLOSED.get(func.__name__, partial(_by_jvp, func))
    for bound in (*args, *kwargs.values()):  # clamp takes tensors, of more axes too
        jet = lift(jet, bound)
    u, slopes, summed = jet.parts
    value, first, second = derivatives(u, *args, **kwargs)
    if second is None:
        return jet.like((value, first * slopes, first * summed))
    # In this order, of which the way back is the reverse, autograd holds the least.
    straight, along = first * summed, first * slopes
    bend = second * (weighted(slopes, jet.weights) * slopes).sum(0, keepdim=True)
    return jet.like((value, along, straight + bend))


def _by_jvp(func: Callable[..., Tensor], v: Tensor, *args: Any, **kwargs: Any) -> Derivatives:
    v = v.clone()  # with symbolic shapes, a view and its tangent would differ in layout
    ones = torch.ones_like(v)

    def slope(at: Tensor) -> Tensor:
        return jvp(lambda u: func(u, *args, **kwargs), (at,), (ones,))[1]

    first, second = jvp(slope, (v,), (ones,))  # type: ignore[misc]  # no aux, so two
    return func(v, *args, **kwargs), first, second


def _tanh(v: Tensor) -> Derivatives:
    f = torch.tanh(v)
    first = 1 - f * f
    return f, first, -2 * (f * first)  # of −2 f autograd would keep a copy


def _sigmoid(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f = torch.sigmoid(v)
    first = f * (1 - f)
    return f, first, first * (1 - 2 * f)


def _silu(v: Tensor) -> Derivatives:
    s, s1, s2 = _sigmoid(v)
    return v * s, s + v * s1, 2 * s1 + v * s2


def _gelu(v: Tensor, approximate: str = "none") -> Derivatives:
    if approximate != "none":
        return _by_jvp(F.gelu, v, approximate=approximate)
    cdf = 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    return v * cdf, cdf + v * density, density * (2 - v * v)


def _softplus(v: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    s, s1, _ = _sigmoid(beta * v)
    straight = beta * v > threshold  # where torch's softplus is the identity
    first = torch.where(straight, torch.ones_like(s), s)
    return F.softplus(v, beta, threshold), first, torch.where(straight, 0.0, beta * s1)


def _sqrt(v: Tensor) -> Derivatives:
    f = torch.sqrt(v)
    first = 0.5 / f
    return f, first, -0.5 * first / v


def _rsqrt(v: Tensor) -> Derivatives:
    f = torch.rsqrt(v)
    return f, -0.5 * f / v, 0.75 * f / (v * v)


def _reciprocal(v: Tensor) -> Derivatives:
    f = torch.reciprocal(v)
    return f, -f * f, 2 * f * f * f


def _log(v: Tensor) -> Derivatives:
    first = torch.reciprocal(v)
    return torch.log(v), first, -first * first


def _exp(v: Tensor) -> Derivatives:
    f = torch.exp(v)
    return f, f, f


def _sin(v: Tensor) -> Derivatives:
    f = torch.sin(v)
    return f, torch.cos(v), -f


def _cos(v: Tensor) -> Derivatives:
    f = torch.cos(v)
    return f, -torch.sin(v), -f


def _erf(v: Tensor) -> Derivatives:
    first = (2 / math.sqrt(math.pi)) * torch.exp(-v * v)
    return torch.erf(v), first, -2 * (v * first)


def _sinc(v: Tensor) -> Derivatives:
    """Near zero by its series, where the second derivative of PyTorch's own is zero."""
    u = math.pi * v
    near = u.abs() < 0.3
    x = torch.where(near, 1.0, u)
    slope = (torch.cos(x) - torch.sin(x) / x) / x
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for k in range(7, 0, -1):  # Σ (−1)ᵏ u²ᵏ / (2k + 1)!, below rounding from here on
        c = (-1) ** k / math.factorial(2 * k + 1)
        first = first * u**2 + 2 * k * c
        second = second * u**2 + 2 * k * (2 * k - 1) * c
    first = torch.where(near, u * first, slope)
    second = torch.where(near, second, -torch.sin(x) / x - 2 * slope / x)
    return torch.sinc(v), math.pi * first, math.pi**2 * second


def _pow(v: Tensor, p: float) -> Derivatives:
    """A coefficient of zero must not meet a negative power of zero."""
    first = p * v ** (p - 1) if p else torch.zeros_like(v)
    return v**p, first, p * (p - 1) * v ** (p - 2) if p not in (0, 1) else None


CLOSED: dict[str, Callable[..., Derivatives]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "log": _log,
    "exp": _exp,
    "sin": _sin,
    "cos": _cos,
    "erf": _erf,
    "sinc": _sinc,
    "pow": _pow,
    "square": lambda v: (v * v, 2 * v, torch.full_like(v, 2.0)),
    "relu": lambda v: (torch.relu(v), (v > 0).to(v.dtype), None),
    "abs": lambda v: (torch.abs(v), torch.sign(v), None),
}
BY_JVP = """
    absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh celu
    clamp clamp_max clamp_min clip cosh elu erfc exp2 expm1 hardswish hardtanh leaky_relu log10
    log1p log2 log_sigmoid logsigmoid mish relu6 selu sinh softsign special_erf special_expit tan
    tanhshrink
"""
RULES: dict[str, Callable[..., Any]] = dict.fromkeys([*CLOSED, *BY_JVP.split()], elementwise)
del RULES["pow"]  # its exponent may be the jet: see products
