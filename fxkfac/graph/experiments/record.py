"""One run of a graph: the shape of every tensor and the value of every number in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxkfac.graph.uses.ir import Example


def record(module: GraphModule, values: Sequence[Tensor]) -> Example:
    """Run a graph and keep the shape of every tensor and the value of every number in it."""
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*values)
    return Example(recorder.shapes, recorder.numbers)


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[Node, torch.Size] = {}
        self.numbers: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        elif isinstance(value, int | float | bool):
            self.numbers[n] = value
        return value
