"""One batch forwards and backwards, into a sink: by autograd as it goes, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.compiled import Compiled, Kind, compiled
from fxkfac.curvature.inside import pays, take_gradients, take_inputs
from fxkfac.curvature.parts import Values
from fxkfac.curvature.receive import Receiver
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program, Run, Tapped


class Differentiable(Protocol):
    """A batch that has run forwards."""

    @property
    def run(self) -> Run:
        """The graph and its prediction."""
        ...

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        """Backpropagate vectors into the sink, one after the other."""
        ...

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        """Gradients of the wanted parameters; `None` where there is no way to one."""
        ...


@dataclass(frozen=True)
class Forward:
    """What a batch is run with.

    Attributes:
        state: Parameters and buffers.
        tensors: The data.
        wanted: Names of the parameters that ask for gradients.
        receiver: What receives the taps.
    """

    program: Program
    tapped: Tapped
    state: Mapping[str, Tensor]
    tensors: list[Tensor]
    wanted: Sequence[str]
    receiver: Receiver


@dataclass(frozen=True)
class _Eager:
    run: Run
    receiver: Receiver
    leaves: Mapping[str, Tensor]

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        self.receiver.send_back(self.run.prediction, vectors)

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        f, leaves = self.run.prediction, list(self.leaves.values())
        if not f.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(f, leaves, cotangent, allow_unused=True)


def _eager(batch: Forward) -> Differentiable:
    leaves = {name: batch.state[name].detach().requires_grad_() for name in batch.wanted}
    state = {**batch.state, **leaves}
    run = batch.program.run_graph(batch.tapped, batch.tensors, state, batch.receiver)
    return _Eager(run, batch.receiver, leaves)


@dataclass(frozen=True)
class _Compiled:
    run: Run
    receiver: Receiver
    sink: Collector | None  # the same, where the code has its sums inside
    code: Compiled
    values: Values

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        if self.code.taps:
            for vector in vectors:
                found = self.code.send_back(self.values, vector)
                if self.sink is None:
                    self.receiver.gradients(found)
                else:
                    take_gradients(self.sink, found)
        self.receiver.finish()

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        return self.code.gradients(self.values, cotangent)


def _inductor(batch: Forward) -> Differentiable:
    arguments, names = [*batch.state.values(), *batch.tensors], list(batch.state)
    places = tuple(names.index(name) for name in batch.wanted)
    sink = batch.receiver if pays(batch.receiver, arguments[0].device) else None
    code = compiled(batch.tapped, tuple(map(Kind.of, arguments)), places, sink)
    values = code.run(arguments)
    if sink is not None:
        take_inputs(sink, code.sums(values), code.rows)
    for use, output in enumerate(code.outputs):
        batch.receiver.input(use, code.input(values, use), output)
    n = batch.program.signature.batch_size(batch.tensors)
    run = Run(batch.tapped, values[code.prediction], n)
    return _Compiled(run, batch.receiver, sink, code, code.read_later(values))


Backend = Callable[[Forward], Differentiable]
BACKENDS: dict[str, Backend] = {"eager": _eager, "inductor": _inductor}


def backend_of(name: str) -> Backend:
    """The one of this name. Raises `OptionError`."""
    if name not in BACKENDS:
        raise OptionError(f"backend={name!r}; expected 'eager' or 'inductor'.")
    return BACKENDS[name]
