"""The registry of rules, and the view of a call that a rule gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Size
from torch._ops import OpOverload
from torch.fx import Node

from fxkfac.graph.form import Form
from fxkfac.graph.overloads import arguments, register


class NotLinear(Exception):
    """Raised by a rule: this call is not linear in this operand. The text is the reason."""


class Operand(NamedTuple):
    """An argument of a call that holds a parameter: its name, and its place in a list argument."""

    name: str
    place: int | None = None


@dataclass(frozen=True)
class Call:
    """One call of an ATen op, its arguments by their names in the op's schema.

    Attributes:
        node: The call's node in the graph.
        args: All arguments by name, defaults filled in. Tensors are nodes.
        shapes: The shape at trace time of every node that is a tensor.
        numbers: The value at trace time of every node that is a number.
    """

    node: Node
    args: Mapping[str, Any]
    shapes: Mapping[Node, Size]
    numbers: Mapping[Node, Any]

    def ndim(self, name: str) -> int:
        """Number of axes of the tensor argument `name`."""
        return len(self.shape(name))

    def shape(self, name: str) -> Size:
        """Shape of the tensor argument `name`."""
        return self.shapes[self.args[name]]

    @property
    def y_shape(self) -> Size:
        """Shape of the output."""
        return self.shapes[self.node]

    def number(self, name: str) -> Any:
        """The value of the scalar or list argument `name`; sizes that are nodes are evaluated."""
        value = self.args[name]
        if isinstance(value, list | tuple):
            return [self.numbers.get(v, v) for v in value]
        return self.numbers.get(value, value)


Rule = Callable[[Call, Operand], Form]

RULES: dict[OpOverload, Rule] = {}


def rule(*overloads: OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule under one or more ATen overloads.

    Args:
        overloads: Such as `torch.ops.aten.linear.default`.

    Returns:
        A decorator, for a function of a `Call` and an `Operand` that returns a `Form`, or raises
        `NotLinear` with the reason.

    Raises:
        OptionError: An overload has a rule of another name already, or it is none.
    """
    return register(RULES, *overloads)


def call_of(node: Node, shapes: Mapping[Node, Size], numbers: Mapping[Node, Any]) -> Call:
    """Bind a node's arguments to the names in its op's schema."""
    return Call(node, arguments(node), shapes, numbers)


def operands(call: Call, wanted: Callable[[Node], bool]) -> Iterator[tuple[Operand, Node]]:
    """The tensor arguments for which `wanted` holds, list arguments opened."""
    for name, value in call.args.items():
        if isinstance(value, Node) and wanted(value):
            yield Operand(name), value
        if isinstance(value, list | tuple):
            for place, item in enumerate(value):
                if isinstance(item, Node) and wanted(item):
                    yield Operand(name, place), item
