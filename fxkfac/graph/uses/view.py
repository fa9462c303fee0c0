"""Views: the layout ops between a parameter and the op that it enters.

A layout op only selects and rearranges entries. So no rule per op is needed to know where an
entry went: the same ops, run on the entries' *numbers* instead of their values, tell it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

# Ops whose output holds entries of their first argument (or of a list of tensors) and no others.
LAYOUT_OPS: dict[Any, str] = {
    aten.t.default: "t",
    aten.transpose.int: "transpose",
    aten.permute.default: "permute",
    aten.numpy_T.default: "T",
    aten.mT.default: "mT",
    aten.adjoint.default: "mT",
    aten.movedim.int: "movedim",
    aten.view.default: "view",
    aten.reshape.default: "view",
    aten._unsafe_view.default: "view",
    aten.flatten.using_ints: "view",
    aten.unflatten.int: "view",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.default: "squeeze",
    aten.squeeze.dim: "squeeze",
    aten.squeeze.dims: "squeeze",
    aten.expand.default: "expand",
    aten.repeat.default: "repeat",
    aten.slice.Tensor: "slice",
    aten.select.int: "select",
    aten.narrow.default: "slice",
    aten.split.Tensor: "split",
    aten.split.sizes: "split",
    aten.split_with_sizes.default: "split",
    aten.chunk.default: "split",
    aten.unbind.int: "unbind",
    aten.cat.default: "cat",
    aten.stack.default: "stack",
    aten.flip.default: "flip",
    aten.roll.default: "roll",
    aten.rot90.default: "rot90",
    aten.diagonal.default: "diagonal",
    aten.as_strided.default: "as_strided",
    operator.getitem: "",
    aten.clone.default: "",
    aten.contiguous.default: "",
    aten.alias.default: "",
    aten.lift_fresh_copy.default: "",
    aten._to_copy.default: "cast",
    aten.to.dtype: "cast",
    aten.to.dtype_layout: "cast",
    aten.mul.Scalar: "scale",
    aten.mul.Tensor: "scale",
    aten.div.Scalar: "scale",
    aten.div.Tensor: "scale",
    aten.neg.default: "scale",
    aten.add.Scalar: "shift",
    aten.add.Tensor: "shift",
    aten.sub.Scalar: "shift",
    aten.sub.Tensor: "shift",
    aten.rsub.Scalar: "scale",
}

# These change values or strides but not which entry is where: skipped when numbers are moved.
VALUE_ONLY = {"", "cast", "scale", "shift"}


@dataclass(frozen=True, eq=False)
class View:
    """The chain of layout ops that leads from parameters to one operand of one op.

    Attributes:
        parameters: Names of the parameters, in the order in which their entries are numbered.
        shapes: Their shapes.
        chain: The nodes of the chain in graph order, placeholders first.
        numbers: Values at trace time of the scalars that the chain uses, such as sizes.
        narrowed: Axes of the operand along which it repeats itself, how many places count, and
            how far these are apart.
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    chain: tuple[Node, ...]
    numbers: Mapping[Node, Any] = field(repr=False)
    narrowed: tuple[tuple[int, int, int], ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the ops that change the layout, in order."""
        moved = self.chain[len(self.shapes) :]
        return tuple(s for n in moved if (s := LAYOUT_OPS.get(n.target, "")))

    @property
    def scale(self) -> float | None:
        """What the parameters' entries are multiplied by; `None` where not all alike."""
        scales: dict[Node, float | None] = dict.fromkeys(self.chain[: len(self.shapes)], 1.0)
        for node in self.chain[len(self.shapes) :]:
            entering = {scales[n] for n in node.all_input_nodes if n in scales}
            before = entering.pop() if len(entering) == 1 else None
            scales[node] = None if before is None else before * scale_of(node)
        return scales[self.chain[-1]]

    @property
    def numel(self) -> int:
        """Number of entries of all the parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def index(self) -> Tensor:
        """For every entry of the operand, its number in the parameters' concatenated rvec."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        numbers = torch.arange(self.numel, device="cpu").split(sizes)
        known: dict[Node, Any] = dict(self.numbers)
        for node, entries, shape in zip(self.chain, numbers, self.shapes, strict=False):
            known[node] = entries.reshape(shape)
        for node in self.chain[len(self.shapes) :]:
            known[node] = _move(node, known)
        operand = known[self.chain[-1]]
        for axis, length, step in self.narrowed:
            operand = operand.index_select(axis, step * torch.arange(length, device=operand.device))
        return operand


def is_layout(node: Node) -> bool:
    """Whether a node selects, rearranges, scales or shifts by a number, and nothing else."""
    if LAYOUT_OPS.get(node.target) in ("scale", "shift"):
        return not any(isinstance(argument, Node) for argument in node.args[1:])
    return node.target in LAYOUT_OPS


def scale_of(node: Node) -> float:
    """What a layout op multiplies every entry by."""
    if LAYOUT_OPS[node.target] != "scale":
        return 1.0
    if node.target is aten.neg.default:
        return -1.0
    if node.target is aten.rsub.Scalar:  # 1 − α w
        return -float(node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
    factor = float(node.args[1])  # type: ignore[arg-type]
    return 1 / factor if node.target in (aten.div.Scalar, aten.div.Tensor) else factor


def _move(node: Node, known: Mapping[Node, Any]) -> Any:
    """Run one layout op on entry numbers."""
    args: Any = torch.fx.map_arg(node.args, known.__getitem__)
    kwargs: Any = torch.fx.map_arg(node.kwargs, known.__getitem__)
    if LAYOUT_OPS[node.target] in VALUE_ONLY and node.target is not operator.getitem:
        return args[0]
    if node.target is aten.as_strided.default:
        args = (args[0].contiguous(), *args[1:])
    return node.target(*args, **kwargs)  # type: ignore[operator]
