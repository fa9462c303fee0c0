"""Ops that meet no data: their output is lifted to the addition where it first meets them.

A table of positions, `embedding(W, arange(T))`, has an output without batch axis: the gradient
there is summed over the data, and no datum's own part is left. The addition that broadcasts the
output over the data has a gradient with all of its parts. So the use is tapped there, and has the
axes of the addition; those along which the output is broadcast are rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.ir import Example, Form
from fxkfac.graph.rules.addition import addition_factor
from fxkfac.graph.rules.registry import NotLinear
from fxkfac.graph.view import View, is_layout, scale_of

SUMMED = (
    "its output is the same for all data, so that the gradient there is summed over the data and "
    "no datum's own part is left; let the op act on the data, one datum at a time"
)


def lift(node: Node, form: Form, dependent: set[Node], example: Example) -> list[tuple[Node, Form]]:
    """The additions at which the op's output meets data, with the op's form there.

    Raises:
        NotLinear: The output reaches something else than an addition.
    """
    return [
        (addition, _at(addition, layout, sign, node, form, example))
        for addition, layout, sign in _additions(node, (), dependent)
    ]


def _additions(
    node: Node, layout: tuple[Node, ...], dependent: set[Node], scale: float = 1.0
) -> Iterator[tuple[Node, tuple[Node, ...], float]]:
    """Follow every reader of an output through layout ops to an addition of data."""
    for user in node.users:
        if is_layout(user) and user not in dependent and user.args[0] is node:
            yield from _additions(user, (*layout, user), dependent, scale * scale_of(user))
        elif user in dependent and (factor := addition_factor(user, node)):
            yield user, layout, scale * factor
        else:
            raise NotLinear(SUMMED)


def _at(
    addition: Node,
    layout: tuple[Node, ...],
    sign: float,
    node: Node,
    form: Form,
    example: Example,
) -> Form:
    """The op's form with the output's axes as they are in the addition."""
    shape, y_shape = example.shapes[addition], example.shapes[node]
    moved = View(("",), (tuple(y_shape),), (node, *layout), example.numbers).index()
    places = moved.expand(shape)
    tokens = axis_tokens(form.y)
    axes = [axis_of(places, a, tuple(y_shape), tokens) for a in range(len(shape))]
    if sorted(t for t in axes if t in tokens) != sorted(
        t for t, n in zip(tokens, y_shape, strict=True) if n > 1
    ):
        raise NotLinear(SUMMED)
    return replace(form, y=" ".join(axes), scale=form.scale * sign)


def axis_of(places: torch.Tensor, axis: int, y_shape: tuple[int, ...], tokens: list[str]) -> str:
    """What one axis of an op that takes an output is: one of its axes, a unit axis, or a new one.

    Args:
        places: The numbers of the output's entries, as they lie in the operand.
        axis: The axis of `places`.
        y_shape, tokens: Shape and axes of the output.
    """
    if places.shape[axis] == 1:
        return "1"
    along = places.movedim(axis, 0).flatten(1)[:, 0]
    for k, token in enumerate(tokens):
        stride = math.prod(y_shape[k + 1 :])
        if along.equal(along[0] + stride * torch.arange(len(along))):
            return token
    if bool((places.diff(dim=axis) == 0).all()):
        return f"s{axis}"
    raise NotLinear(SUMMED)
