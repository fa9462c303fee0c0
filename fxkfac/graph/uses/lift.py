"""Ops that meet no data: their output is lifted to the addition where it first meets them.

A table of positions, `embedding(W, arange(T))`, has an output without batch axis: the gradient
there is summed over the data, and no datum's own part is left. The addition that broadcasts the
output over the data has a gradient with all of its parts. So the use is tapped there, and has the
axes of the addition; those along which the output is broadcast are rows, and an axis that a reshape
took apart on the way is as many axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from fxkfac.graph.axes import axis_tokens, renamed
from fxkfac.graph.dependence import LIKE, SHAPE_ONLY
from fxkfac.graph.form import Form
from fxkfac.graph.rules.addition import addition_factor
from fxkfac.graph.rules.registry import NotLinear
from fxkfac.graph.uses.ir import Example
from fxkfac.graph.uses.places import are_axes, own_axes
from fxkfac.graph.uses.view import View, is_layout, scale_of

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
        for addition, layout, sign in _additions(node, (), dependent, example)
    ]


def _additions(
    node: Node,
    layout: tuple[Node, ...],
    dependent: set[Node],
    example: Example,
    scale: float = 1.0,
) -> Iterator[tuple[Node, tuple[Node, ...], float]]:
    """Follow every reader of an output through layout ops to an addition of data."""
    for user in node.users:
        if user.target in SHAPE_ONLY | LIKE:
            continue
        example.require_real(user)
        if is_layout(user) and user not in dependent and user.args[0] is node:
            moved, factor = (*layout, user), scale_of(user)
            yield from _additions(user, moved, dependent, example, scale * factor)
        elif _spreads(user, node, dependent, example) and (factor := addition_factor(user, node)):
            yield user, layout, scale * factor
        else:
            raise NotLinear(SUMMED)


def _spreads(user: Node, node: Node, dependent: set[Node], example: Example) -> bool:
    """Whether a reader meets data, or something in their shape, such as a mask without values."""
    return user in dependent or example.shapes.get(user) != example.shapes.get(node)


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
    names, parts, sizes = _named(places, axis_tokens(form.y), tuple(y_shape))
    lifted = replace(
        form,
        weight=renamed(form.weight, parts),
        x=renamed(form.x, parts),
        y=" ".join(names),
        sizes={**form.sizes, **sizes},
        scale=form.scale * sign,
    )
    if not are_axes(places, renamed(form.y, parts), names, tuple(y_shape), lifted.sizes):
        raise NotLinear(SUMMED)
    return lifted


def _named(
    places: Tensor, tokens: list[str], y_shape: tuple[int, ...]
) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Names of the addition's axes; what axes taken apart became, and the sizes of the parts."""
    names = [f"s{a}" for a in range(places.ndim)]
    parts: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for token, own in zip(tokens, own_axes(places, y_shape), strict=True):
        if len(own) == 1:
            names[own[0]] = token
            continue
        if token.startswith("("):
            raise NotLinear(SUMMED)
        split = {f"{token}_{j}": a for j, a in enumerate(own)}
        parts[token] = " ".join(split) or "1"  # a row axis that a reshape takes apart, or a unit
        sizes |= {part: places.shape[a] for part, a in split.items()}
        for part, a in split.items():
            names[a] = part
    return names, parts, sizes
