"""Biases: which weight use a bias shares its rows with, so that W̃ = (W b) and x̃ = (x 1).

A bias that is added later than the product shares its rows if only layout ops lie between, and if
nothing else reads the product on the way: then both outputs have the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from einops import rearrange, repeat
from torch import Tensor
from torch.fx import Graph, Node

from fxkfac.graph.axes import axis_lengths
from fxkfac.graph.dependence import LIKE, SHAPE_ONLY
from fxkfac.graph.form import Form, OneHot
from fxkfac.graph.rules.addition import addition_factor
from fxkfac.graph.uses.ir import Example, Join, Use
from fxkfac.graph.uses.view import View, is_layout, scale_of


def join_biases(uses: list[Use], graph: Graph, example: Example) -> list[Use]:
    """Give every bias that shares the rows of a weight use its `join`."""
    nodes = {n.name: n for n in graph.nodes}
    weights = {
        use.node: place
        for place, use in enumerate(uses)
        if not use.is_bias and _has_column(use.form)
    }
    joined, taken = [], set[int]()
    for use in uses:
        join = _join(use, uses, weights, nodes, example) if use.is_bias else None
        if join is not None and join.weight not in taken:
            taken.add(join.weight)
            use = replace(use, join=join)
        joined.append(use)
    return joined


def _has_column(form: Form) -> bool:
    """Whether a bias may be one more column.

    Not beside one-hot rows, patches of y, a scale, or matrices of which a row chooses one.
    """
    plain = form.folded is None and not (form.routes and form.routes.axis)
    return plain and not isinstance(form.prepare, OneHot) and not form.is_elementwise


def _join(
    bias: Use,
    uses: list[Use],
    weights: Mapping[str, int],
    nodes: Mapping[str, Node],
    example: Example,
) -> Join | None:
    node = nodes[bias.node]
    path = _path_to_product(node, weights, example)
    if path is None:
        return None
    product, layout, factor = path
    weight = weights[product.name]
    entries = _entries(uses[weight], bias, node, product, layout, example)
    return None if entries is None else Join(weight, entries, bias.form.scale / factor)


def _path_to_product(
    node: Node, weights: Mapping[str, int], example: Example
) -> tuple[Node, list[Node], float] | None:
    """The product that reaches `node` unread by others, the layout ops between, and its factor."""
    if node.name in weights:
        return node, [], 1.0
    for below in node.all_input_nodes:
        layout, factor = list[Node](), addition_factor(node, below)
        while below.name not in weights and _moves_one(below, example) and _read_once(below):
            layout.insert(0, below)
            factor *= scale_of(below)
            below = below.all_input_nodes[0]
        if factor and below.name in weights and _read_once(below):
            return below, layout, factor
    return None


def _moves_one(node: Node, example: Example) -> bool:
    """Whether it is a layout op, and of one tensor: of several, each would have rows."""
    return is_layout(node) and sum(n not in example.numbers for n in node.all_input_nodes) == 1


def _read_once(node: Node) -> bool:
    """Whether one op alone reads the values; others may read the shape."""
    return sum(user.target not in SHAPE_ONLY | LIKE for user in node.users) == 1


def _entries(
    weight: Use, bias: Use, node: Node, product: Node, layout: list[Node], example: Example
) -> Tensor | None:
    """For every (group, out) of the weight use, the number of the bias entry that is added there.

    `None` where the bias differs from row to row, or leaves entries out.
    """
    added = _over_output(bias)
    shape = example.shapes[product]
    if node is not product:
        moved = View(("",), (tuple(shape),), (product, *layout), example.numbers).index()
        if moved.shape != added.shape:
            return None
        added = added.new_full((shape.numel(),), -1).index_put((moved.flatten(),), added.flatten())
    table = _by_row(weight, added.reshape(shape))
    if not len(table):  # no row was routed here
        return None
    constant = bool((table == table[:1]).all())
    every_entry_once = (
        table[0].flatten().sort().values.equal(bias.view.index().flatten().sort().values)
    )
    return table[0] if constant and every_entry_once else None


def _over_output(bias: Use) -> Tensor:
    """At every entry of the op's output, the number of the bias entry that is added there."""
    form = bias.form
    lengths = axis_lengths(form.y, bias.y_shape, form.sizes)
    return repeat(bias.view.index(), f"{form.weight} -> {form.y}", **lengths)


def _by_row(weight: Use, over_output: Tensor) -> Tensor:
    """Bring a tensor of the weight use's output into (rows, group, out)."""
    form = weight.form
    rows, group, out = (f"({' '.join(axes)})" for axes in (form.rows, form.group, form.d_out))
    lengths = axis_lengths(form.y, over_output.shape, form.sizes)
    return rearrange(over_output, f"{form.y} -> {rows} {group} {out}", **lengths)
