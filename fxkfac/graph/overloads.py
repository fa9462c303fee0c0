"""What is known of ATen overloads: tables by overload, and a call's arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxkfac.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])


def register(table: dict[OpOverload, F], *overloads: OpOverload) -> Callable[[F], F]:
    """Put a function into a table under one or more overloads.

    One of another name is not replaced; one of the same is, as where a cell runs again.
    """
    for overload in overloads:
        if not isinstance(overload, OpOverload):
            raise OptionError(
                f"{overload!r} is of type {type(overload).__name__}; expected an overload of an "
                "op, such as torch.ops.aten.linear.default."
            )

    def put(function: F) -> F:
        for overload in overloads:
            held = table.get(overload)
            if held is not None and _full_name(held) != _full_name(function):
                raise OptionError(f"{overload} has a rule already: {held.__name__}")
            table[overload] = function
        return function

    return put


def _full_name(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def draws(target: Any) -> bool:
    """Whether an op draws random numbers."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def may_draw(graph: Graph) -> bool:
    """Whether an op draws random numbers, or is somebody's own, of which it is not known."""
    return not all(_draws_nothing(n.target) for n in graph.nodes if n.op.startswith("call"))


def _draws_nothing(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return target.namespace == "aten" and not draws(target)
    return is_arithmetic(target)


def is_arithmetic(target: Any) -> bool:
    """Whether it is one of Python's own operators, as sizes and tuples take them."""
    return getattr(target, "__module__", "") == "_operator"


def arguments(node: Node) -> dict[str, Any]:
    """A call's arguments by their names in the op's schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    named: dict[str, Any] = {}
    for place, argument in enumerate(node.target._schema.arguments):
        if place < len(node.args):
            named[argument.name] = node.args[place]
        else:
            named[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return named
