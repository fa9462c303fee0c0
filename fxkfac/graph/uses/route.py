"""Matrices that are looked up: the product that takes them is tapped, with a group for each.

`W[i]` chooses a matrix of W for every row, as of an expert for every token. As a look-up its factor
B would hold the products of all entries of a matrix. Where the chosen matrices only enter products,
these are linear ops with one group for each matrix, of which a row has the one that it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxkfac.graph.axes import axis_tokens, letters
from fxkfac.graph.form import Form, OneHot, Routes
from fxkfac.graph.rules.registry import RULES, NotLinear, Operand, call_of, operands
from fxkfac.graph.uses.ir import Example
from fxkfac.graph.uses.places import are_axes, own_axes
from fxkfac.graph.uses.view import View, is_layout

aten = torch.ops.aten

LOOK_UPS = {aten.index.Tensor, aten.index_select.default}
GROUP = "chosen"


def route(node: Node, form: Form, example: Example) -> list[tuple[Node, Form]]:
    """The products that take the matrices which `node` looks up, with the form of each.

    Args:
        node: An op.
        form: Its form, as the rule for look-ups gives it.
        example: Shapes and numbers of one run.

    Returns:
        An empty list where `node` is no look-up, or where its output is no matrix of a product
        wherever it is read: then it is tapped itself.
    """
    if node.target not in LOOK_UPS or not isinstance(form.prepare, OneHot) or not node.users:
        return []
    try:
        return [
            (user, _at(user, operand, layout, node, form, example))
            for user, operand, layout in _products(node, (), example)
        ]
    except NotLinear:
        return []


def _products(
    node: Node, layout: tuple[Node, ...], example: Example
) -> Iterator[tuple[Node, Operand, tuple[Node, ...]]]:
    """Follow every reader of an output through layout ops to the op that takes it."""
    for user in node.users:
        example.require_real(user)
        if is_layout(user) and user.args[0] is node:
            yield from _products(user, (*layout, user), example)
        elif isinstance(user.target, OpOverload) and user.target in RULES:
            taken = list(operands(call_of(user, {}, {}), lambda n: n is node))
            if len(taken) != 1:
                raise NotLinear("it is multiplied by itself")
            yield user, taken[0][0], layout
        else:
            raise NotLinear("it enters an op without rule")


def _at(
    product: Node,
    operand: Operand,
    layout: tuple[Node, ...],
    node: Node,
    form: Form,
    example: Example,
) -> Form:
    """The product as an op with one group for each matrix."""
    assert isinstance(product.target, OpOverload)
    taken = RULES[product.target](call_of(product, example.shapes, example.numbers), operand)
    moved = View(("",), (tuple(example.shapes[node]),), (node, *layout), example.numbers)
    if moved.scale is None or taken.routes or taken.prepare:
        raise NotLinear("it is taken apart")
    became = _became(moved, axis_tokens(form.y), axis_tokens(taken.weight))
    rows = [became[t] for t in axis_tokens(form.y) if t in letters(form.x)]
    assert form.input is not None
    assert isinstance(form.prepare, OneHot)
    found = replace(
        taken,
        weight=" ".join(GROUP if t == "v" else became[t] for t in axis_tokens(form.weight)),
        routes=Routes(form.input, " ".join(rows), GROUP, form.prepare.size),
        scale=taken.scale * form.scale * moved.scale,
    )
    lost = [a for a in rows if a != "1" and a not in found.rows]
    if lost or not found.d_in or not found.d_out:
        raise NotLinear("it is no matrix of a product for each row")
    return found


def _became(moved: View, tokens: list[str], own: list[str]) -> dict[str, str]:
    """What each axis of the looked-up tensor is called in the product."""
    places, (shape,) = moved.index(), moved.shapes
    found = own_axes(places, shape)
    if len(own) != places.ndim or any(len(axes) > 1 for axes in found):
        raise NotLinear("its axes are no longer apart")
    at = {axes[0]: token for token, axes in zip(tokens, found, strict=True) if axes}
    y = " ".join(t if axes else "1" for t, axes in zip(tokens, found, strict=True))
    if not are_axes(places, y, [at.get(a, "1") for a in range(places.ndim)], shape, {}):
        raise NotLinear("its axes are no longer apart")
    return dict.fromkeys(tokens, "1") | {token: own[axis] for axis, token in at.items()}
