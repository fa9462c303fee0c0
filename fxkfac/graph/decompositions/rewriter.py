"""The registry of decompositions, and what one of them gets: a node and a way to write others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxkfac.graph.overloads import arguments, register


class Rewriter:
    """The node that is rewritten, its arguments by name, and a way to write ops in its place."""

    def __init__(self, graph: Graph, node: Node, own: set[Node]) -> None:
        assert isinstance(node.target, OpOverload)
        self.graph, self.node, self.own = graph, node, own
        self.schema, self.arguments = node.target._schema, arguments(node)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One more op; it comes from the same line of the user's code."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
        return made

    def without(self, *names: str) -> Node:
        """The same op with these arguments left out, of which some ops have not all."""
        return self._again({name: None for name in names if name in self.arguments})

    def replaced(self, name: str, value: Node) -> Node:
        """The same op with another value for one argument."""
        return self._again({name: value})

    def _again(self, other: Mapping[str, Any]) -> Node:
        values = {**self.arguments, **other}
        named = {a.name: values.pop(a.name) for a in self.schema.arguments if a.kwarg_only}
        return self.call(self.node.target, *values.values(), **named)

    def is_parameter(self, value: Any) -> bool:
        """Whether an argument is made of parameters, and not of data."""
        return value in self.own


Rewrite = Callable[[Rewriter], Node | None]

DECOMPOSITIONS: dict[OpOverload, Rewrite] = {}


def decomposition(*overloads: OpOverload) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite, which returns what stands in the node's place, or `None` to leave it."""
    return register(DECOMPOSITIONS, *overloads)
