"""One run of a graph: the shape of every tensor, which are complex, the value of every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxkfac.graph.uses.ir import Example


def record(module: GraphModule, values: Sequence[Tensor]) -> Example:
    """Run a graph and keep what `Example` holds of every tensor and number in it."""
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*values)
    return Example(recorder.shapes, recorder.numbers, recorder.complex)


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[Node, torch.Size] = {}
        self.numbers: dict[Node, Any] = {}
        self.complex: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
            if value.is_complex():
                self.complex.add(n)
        elif isinstance(value, int | float | bool):
            self.numbers[n] = value
        return value
