"""What the network says of parameters and uses: names, shapes and sizes as plain values."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from fxkfac.graph.form import BatchAxis, OneHot
from fxkfac.graph.structure import Choice
from fxkfac.graph.table import orientation, shape_text
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import normal_weight
from fxkfac.graph.uses.view import LAYOUT_OPS

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

SYMBOL = re.compile(r"\bs\d+\b")


def use_attributes(
    program: Program, place: int, structures: Mapping[str, Choice]
) -> dict[str, Any]:
    """Shapes, batch axis and orientation of one use, given by its position; sizes of its factors.

    There are sizes where its block has factors of its own.
    """
    use = program.uses[place]
    weight = program.uses[use.join.weight] if use.join and _is_factored(use, structures) else None
    weight = weight if weight and _is_factored(weight, structures) else None
    attributes: dict[str, Any] = {
        "tap": use.tap,
        "tapped": use.node,
        "input": _input_text(use),
        "x": "1" if use.is_bias else shape_text(use.x_shape, use.form.x, use),
        "y": shape_text(use.y_shape, use.form.y, use),
        "batch": str(use.batch) if use.batch else "unknown",
        "orientation": orientation(use),
        "joins": " + ".join(weight.parameters) if weight else "",
    }
    if weight or not _is_factored(use, structures):
        return attributes
    biases = [u for u in program.uses if u.join and u.join.weight == place]
    return attributes | _sizes(use, any(_is_factored(u, structures) for u in biases))


def _input_text(use: Use) -> str:
    """Names of the nodes of x and, with routes, of their numbers; empty for the constant one."""
    routes = [use.form.routes.index] if use.form.routes else []
    return " ".join(_original(n).name for n in (use.form.input, *routes) if n is not None)


def _original(node: Node) -> Node:
    """What a node is a copy of; one of several outputs is a value of its own."""
    while LAYOUT_OPS.get(node.target) == "" and node.target is not operator.getitem:
        (node,) = node.all_input_nodes
    return node


def _is_factored(use: Use, structures: Mapping[str, Choice]) -> bool:
    return all(structures[name].structure == "kronecker" for name in use.parameters)


def _sizes(use: Use, joined: bool) -> dict[str, Any]:
    """A is (group, d_in, d_in), B is (group, d_out, d_out)."""
    with torch.device("meta"):  # shapes only: an embedding has many entries
        group, d_in, d_out = normal_weight(use).shape
    d_in += joined
    diagonal = isinstance(use.form.prepare, OneHot)
    sizes = {"group": group, "d_in": d_in, "d_out": d_out}
    return sizes | {
        "A": f"diagonal {d_in}" if diagonal else times((d_in, d_in)),
        "B": times((d_out, d_out)),
    }


def parameter_attributes(
    program: Program, name: str, structures: Mapping[str, Choice]
) -> dict[str, Any]:
    """Shape, status and structure of one parameter."""
    tensor = program.model.tensors[name]
    used = {p for use in program.uses for p in use.parameters}
    reasons = [u.reason for u in program.tapped.unsupported if name in u.parameters]
    structure = structures[name].structure if name in structures else ""
    is_used = name in used or structure in ("derived", "identity", "skip")
    status = "unsupported" if reasons else "covered" if is_used else "unused"
    return {
        "kind": "parameter",
        "name": name,
        "shape": times(tensor.shape),
        "numel": tensor.numel(),
        "status": status if name in program.asked.selected else "frozen",
        "reason": reasons[0] if reasons else "",
        "structure": structure,
    }


def times(sizes: Iterable[Any]) -> str:
    """Sizes with × between them."""
    return "×".join(map(str, sizes)) or "scalar"


def symbols_of(program: Program) -> dict[str, str]:
    """What is written for the symbols of a front end: N for that of the data, else the number."""
    captured, axes = program.tapped.captured, program.signature.axes
    ends = captured.module.graph.find_nodes(op="placeholder")
    shapes = {node: getattr(node.meta.get("val"), "shape", ()) for node in ends}
    sizes = [size for shape in shapes.values() for size in shape if isinstance(size, SymInt)]
    inputs = zip(captured.inputs(), axes, strict=True)
    data = [shapes[node][axis] for node, axis in inputs if shapes[node] and axis is not None]
    return {str(size): str(size.node.hint) for size in sizes} | {str(size): "N" for size in data}


def shape_of(
    node: Node, symbols: Mapping[str, str], batch: tuple[int, int, int] | None = None
) -> str:
    """The shape that the front end recorded; empty where there is none.

    Args:
        node: A node of the captured graph.
        symbols: What `symbols_of` returned.
        batch: Where the batch axis is, as (axis, outer, inner), if it is known otherwise.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = [_size_text(n, symbols) for n in value.shape]
    if batch is not None:
        sizes[batch[0]] = str(BatchAxis("", *batch[1:])).removeprefix("=")
    return times(sizes)


def _size_text(size: int | SymInt, symbols: Mapping[str, str]) -> str:
    text = str(size)
    found = {symbols.get(name, "N") for name in SYMBOL.findall(text)}
    if isinstance(size, SymInt) and "N" not in found:
        return str(size.node.hint)
    return SYMBOL.sub(lambda name: symbols.get(name[0], "N"), text).replace("*", "·")
