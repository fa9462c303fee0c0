"""Tapped graph -> compiled code for one shape of batch: forwards, and back from the prediction.

Autograd is run while tracing, so that forward and backward pass become one joint graph:

    (parameters, data) -> prediction, inputs of the uses        vector -> gradients at the taps

It is cut at the prediction: what no vector reaches is the forward part, and hands over what the
others read. So vectors are made of the prediction, and labels drawn, by the same code as ever, and
one compiled backward pass serves all vectors. Products of rows stay with the sink, which adds them
up in place, one triangle of each; or, where that is faster, they are in the graph: see `inside`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.inductor.code import Code, Values, code_of, names_of, nodes_in, read
from fxkfac.curvature.inductor.inside import GradientPieces, InputPieces, recording
from fxkfac.curvature.inductor.traced import Kind, prediction_kind, traceable, traced
from fxkfac.curvature.together import gradients_of
from fxkfac.graph.tap import Taps
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.normal import Input, detached


@dataclass(frozen=True)
class Compiled:
    """A tapped graph for one shape of batch. What is nested has names in the place of tensors.

    Attributes:
        arguments: A vector, a cotangent; then parameters, buffers and data, as the graph has them.
        forward: From parameters and data to the prediction, inputs, and what is read later.
        backward: From a vector to the gradients at the taps; or sums in the place of either.
        gradient: From a cotangent to the gradients of parameters.
        prediction: The prediction.
        inputs: The input of every use, by its position; or what A is made of.
        taps: The gradients at the taps at which one arrives; or what B is made of.
        wanted: Gradients of parameters; `None` where the prediction does not depend on one.
        later: What is read when something is sent back.
        outputs: For every use, what has the shape of its op's output.
        layout: How vectors are in memory.
    """

    arguments: tuple[str, ...]
    forward: Code
    backward: Code
    gradient: Code
    prediction: str
    inputs: Any
    taps: Any
    wanted: tuple[str | None, ...]
    later: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    layout: Kind

    @property
    def hears(self) -> bool:
        """Whether anything of a vector arrives, which may be the vector itself."""
        return any(isinstance(name, str) for name in pytree.tree_leaves(self.taps))

    def run(self, tensors: Iterable[Tensor]) -> Values:
        """Run forwards on parameters, buffers and data."""
        return self.forward(dict(zip(self.arguments[2:], tensors, strict=True)))

    def input(self, values: Values, use: int) -> Input:
        """The input of a use."""
        found: Input = read(self.inputs[use], values)
        return found

    def read_later(self, values: Values) -> Values:
        """Those of the values that are needed to send something back."""
        return {name: values[name] for name in self.later}

    def add_gradients(self, values: Values, vector: Tensor, sink: Collector) -> None:
        """Add to B what it is made of for a vector, where sums are in the graph."""
        self.taps.give(self._sent_back(values, vector), sink)

    def send_back(self, values: Values, vector: Tensor) -> dict[int, Tensor]:
        """The gradients that arrive at the taps."""
        found: dict[int, Tensor] = read(self.taps, self._sent_back(values, vector))
        return found

    def gradients(self, values: Values, cotangent: Tensor) -> list[Tensor | None]:
        """The gradients of parameters."""
        found = self.gradient({**values, self.arguments[1]: self._laid_out(cotangent)})
        return [name if name is None else found[name] for name in self.wanted]

    def _sent_back(self, values: Values, vector: Tensor) -> Values:
        return self.backward({**values, self.arguments[0]: self._laid_out(vector)})

    def _laid_out(self, vector: Tensor) -> Tensor:
        """A vector in the layout for which the graph was compiled."""
        vector = vector.resolve_neg()
        if Kind.of(vector) == self.layout:
            return vector
        return self.layout.empty().copy_(vector)


def compiled(
    tapped: Tapped,
    kinds: tuple[Kind, ...],
    wanted: tuple[int, ...] = (),
    sink: Collector | None = None,
) -> Compiled:
    """The compiled graph for parameters, buffers and data of these kinds; once for each shape.

    Args:
        tapped: The graph.
        kinds: Shapes, layouts and dtypes of its arguments.
        wanted: Which of these ask for gradients, by position.
        sink: Whose sums the graph has inside; without one, it returns what they are made of.

    Raises:
        OptionError: The graph cannot be traced.
    """
    sums = None if sink is None else (sink.schedule, sink.settings.sharing)
    key = ("compiled", kinds, wanted, sums)
    return tapped.once(key, lambda: _compiled(tapped, kinds, wanted, sink))


def _compiled(
    tapped: Tapped, kinds: tuple[Kind, ...], wanted: tuple[int, ...], sink: Collector | None
) -> Compiled:
    recorder = _Recorder(tapped, sink)
    with traceable():
        joint, results, layout = _joint(recorder, kinds, wanted)
    vector, cotangent, *_ = arguments = [n for n in joint.graph.nodes if n.op == "placeholder"]
    backward = code_of(joint, results["taps"], _reached(vector))
    gradient = code_of(joint, results["wanted"], _reached(cotangent))
    first = set(joint.graph.nodes) - _reached(vector) - _reached(cotangent)
    sent_back = {n.name for n in nodes_in([results["taps"], results["wanted"]])}
    reads = {*backward.reads, *gradient.reads, *sent_back}
    later = [n for n in joint.graph.nodes if n in first and n.name in reads]
    outcome = [results["prediction"], results["inputs"], later]
    return Compiled(
        arguments=tuple(n.name for n in arguments),
        forward=code_of(joint, outcome, first),
        backward=backward,
        gradient=gradient,
        later=tuple(n.name for n in later),
        outputs=tuple(recorder.outputs[u.tap].shape_only() for u in tapped.uses if sink is None),
        layout=layout,
        **names_of(results),
    )


@dataclass
class _Recorder:
    """Records what a graph gives to those who listen, and what is known of it without values.

    Attributes:
        sink: Whose sums are in the graph; without one, it gives what these are made of.
        outputs: Of what kind are the outputs at the taps.
    """

    tapped: Tapped
    sink: Collector | None
    outputs: dict[int, Kind] = field(default_factory=dict)

    def record(self, asked: list[Tensor], vector: Tensor) -> tuple[Tensor, Any, Any]:
        """The prediction, and what is there with it and when the vector was sent back."""
        return self._taps(asked, vector) if self.sink is None else self._sums(asked, vector)

    def _taps(self, asked: list[Tensor], vector: Tensor) -> tuple[Tensor, Any, Any]:
        taps = Taps()
        f = self.tapped.module(taps, *asked)
        self.outputs.update({k: Kind.of(y) for k, y in taps.outputs.items()})
        arriving = gradients_of(f, list(taps.outputs.values()), vector, True)
        found = {k: g for k, g in zip(taps.outputs, arriving, strict=True) if g is not None}
        return f, {k: detached(x) for k, x in taps.inputs.items()}, found

    def _sums(self, asked: list[Tensor], vector: Tensor) -> tuple[Tensor, Any, Any]:
        assert self.sink is not None
        collector = recording(self.sink, vector.device)
        f = self.tapped.module(collector, *asked)
        collector.send_back(f, [vector])
        with torch.no_grad():
            return f, InputPieces.of(collector), GradientPieces.of(collector)


def _joint(
    recorder: _Recorder, kinds: tuple[Kind, ...], wanted: tuple[int, ...]
) -> tuple[GraphModule, dict[str, Any], Kind]:
    """Forward and backward pass as one graph, its results, and of what kind the prediction is."""
    f = prediction_kind(recorder.tapped, kinds)

    def joint(vector: Tensor, cotangent: Tensor, *arguments: Tensor) -> dict[str, Any]:
        asked = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(arguments)]
        f, inputs, taps = recorder.record(asked, vector)
        gradients = gradients_of(f, [asked[k] for k in wanted], cotangent, True)
        return {"prediction": f.detach(), "inputs": inputs, "taps": taps, "wanted": gradients}

    return *traced(joint, [f, f, *kinds]), f


def _reached(start: Node) -> set[Node]:
    """A node and all that are computed from it."""
    found = {start}
    for node in start.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
