"""Sums and products, of jets with jets and with what does not depend on x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxkfac.taylor.elementwise import elementwise
from fxkfac.taylor.jet import Jet, Parts, lift, refuse, weighted

Product = Callable[[Tensor, Tensor], Tensor]  # broadcasts along the streams' axis


def add(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Jet:
    """a + alpha·b; a constant moves the value alone."""
    b = b if isinstance(alpha, int) and alpha == 1 else alpha * b
    if isinstance(a, Jet) and isinstance(b, Jet):
        return a.like(lift(a, b).streams + lift(b, a).streams)
    jet, fixed = (a, b) if isinstance(a, Jet) else (b, a)
    value, *rest = lift(jet, fixed).parts
    value = value + fixed
    slopes, second = (part.expand(-1, *value.shape[1:]) for part in rest)
    return jet.like((value, slopes, second))


def subtract(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Jet:
    """a − alpha·b."""
    return add(func, a, b, alpha=-alpha)


def reversed_subtract(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Jet:
    """b − alpha·a."""
    return subtract(func, b, a, alpha=alpha)


def multiply(func: Any, a: Any, b: Any) -> Jet:
    """Entry by entry."""
    return _bilinear(torch.mul, a, b)


def divide(func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Jet:
    """a / b, where a jet b is inverted first."""
    if rounding_mode is not None:
        refuse(f"div(rounding_mode={rounding_mode!r})")
    if not isinstance(b, Jet):
        return a.like(lift(a, b).streams / b)
    return multiply(func, a, elementwise(torch.reciprocal, b))


def power(func: Any, base: Any, exponent: Any) -> Jet:
    """A jet to a number, or a positive number to a jet."""
    if isinstance(base, Jet) and isinstance(exponent, int | float):
        return elementwise(torch.pow, base, exponent)
    if isinstance(exponent, Jet) and isinstance(base, int | float) and base > 0:
        return elementwise(torch.exp, multiply(func, exponent, math.log(base)))
    refuse("pow of this base and exponent", "Write it as exp(exponent * log(base))")


def matmul(func: Any, a: Any, b: Any) -> Jet:
    """Any matrix product; the streams are one more batch axis in front."""
    if any(isinstance(factor, Jet) and factor.ndim < 2 for factor in (a, b)):
        refuse("a matrix product with a vector of data", "Write each row's product as an einsum")
    return _bilinear(torch.matmul, a, b)


def linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Jet:
    """One product of the weight with all streams; then the bias, to the value alone."""
    if not isinstance(input, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
        refuse("linear with a weight or bias that depends on x", "Write it as matmul and add")
    out = input.like(F.linear(input.streams, weight))
    return out if bias is None else add(torch.add, out, bias)


def addmm(func: Any, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Jet:
    """beta·bias + alpha·(a @ b)."""
    of_points = isinstance(a, Jet) or isinstance(b, Jet)
    product = matmul(func, a, b) if of_points else a @ b  # the bias alone may depend on them
    product = product * alpha if alpha != 1 else product
    return add(func, product, bias, alpha=beta)


def einsum(func: Any, equation: Any, *operands: Any) -> Jet:
    """The streams get a letter of their own, in every jet and in the result."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    jets = [operand for operand in operands if isinstance(operand, Jet)]
    if not isinstance(equation, str) or len(jets) > 2:
        refuse("einsum of lists, or of more than two operands that depend on x", "Split it up")
    marked = _marked(equation, [isinstance(operand, Jet) for operand in operands])

    def product(*streams: Tensor) -> Tensor:
        given = iter(streams)
        return torch.einsum(marked, *(next(given) if isinstance(o, Jet) else o for o in operands))

    if len(jets) == 1:
        return jets[0].like(product(jets[0].streams))
    return jets[0].like(_leibniz(product, *jets))  # letters say what belongs together: no lift


def _marked(equation: str, are_jets: list[bool]) -> str:
    """The equation with one more letter, for the streams."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.replace(",", "").replace(".", "")
    if not arrow:
        once = sorted(letter for letter in letters if letters.count(letter) == 1)
        out = "".join(["..." if "..." in inputs else "", *once])
    free = next(letter for letter in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTS" if letter not in letters)
    parts = zip(inputs.split(","), are_jets, strict=True)
    marked = ",".join(free + part if is_jet else part for part, is_jet in parts)
    return f"{marked}->{free}{out}"


def _bilinear(product: Product, a: Any, b: Any) -> Jet:
    """A product of two factors, at least one of them a jet."""
    if not isinstance(a, Jet):
        return b.like(product(a, lift(b, a).streams))
    if not isinstance(b, Jet):
        return a.like(product(lift(a, b).streams, b))
    return a.like(_leibniz(product, lift(a, b), lift(b, a)))


def _leibniz(product: Product, a: Jet, b: Jet) -> Parts:
    """∂(a·b) = a·∂b + ∂a·b; the second derivatives get twice Σ_d w_d ∂_d a·∂_d b on top."""
    u, slopes_u, _ = a.parts
    v, slopes_v, _ = b.parts
    D = len(slopes_u)
    rest = product(u, b.streams[1:]) + product(a.streams[1:], v)
    slopes, second = rest.split([D, 1])
    cross = 2 * product(weighted(slopes_u, a.weights), slopes_v).sum(0, keepdim=True)
    return product(u, v), slopes, second + cross


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), add),
    **dict.fromkeys(("sub", "subtract"), subtract),
    **dict.fromkeys(("rsub", "__rsub__"), reversed_subtract),
    **dict.fromkeys(("mul", "multiply"), multiply),
    **dict.fromkeys(("div", "divide", "true_divide"), divide),
    "pow": power,
    "float_power": lambda func, *of: power(
        func, *(t.double() if isinstance(t, Jet) else t for t in of)
    ),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    "__rpow__": lambda func, a, b: power(func, b, a),
    "__rmatmul__": lambda func, a, b: matmul(func, b, a),
    "linear": linear,
    "addmm": addmm,
    "einsum": einsum,
}
