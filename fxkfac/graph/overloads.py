"""What is known of ATen overloads: tables by overload, and a call's arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx import Node

F = TypeVar("F", bound=Callable[..., Any])


def register(table: dict[OpOverload, F], *overloads: OpOverload) -> Callable[[F], F]:
    """Put a function into a table under one or more overloads. Doing so twice is an error."""

    def put(function: F) -> F:
        for overload in overloads:
            if overload in table:
                raise ValueError(f"{overload} has a rule already: {table[overload].__name__}")
            table[overload] = function
        return function

    return put


def draws(target: Any) -> bool:
    """Whether an op draws random numbers."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


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
