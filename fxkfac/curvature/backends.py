"""One batch forwards and backwards, into a collector: by autograd as it goes, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.compiled import Compiled, Kind, compiled
from fxkfac.curvature.parts import Values
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program, Run, Tapped


class Differentiable(Protocol):
    """A batch that has run forwards."""

    @property
    def run(self) -> Run:
        """The graph and its prediction."""
        ...

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        """Backpropagate vectors into the collector, one after the other."""
        ...

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        """Gradients of the wanted parameters; `None` where there is no way to one."""
        ...


@dataclass(frozen=True)
class _Eager:
    run: Run
    collector: Collector
    leaves: Mapping[str, Tensor]

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        self.collector.send_back(self.run.prediction, vectors)

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        f, leaves = self.run.prediction, list(self.leaves.values())
        if not f.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(f, leaves, cotangent, allow_unused=True)


def _eager(
    program: Program,
    tapped: Tapped,
    state: Mapping[str, Tensor],
    tensors: list[Tensor],
    wanted: Sequence[str],
    collector: Collector,
) -> Differentiable:
    leaves = {name: state[name].detach().requires_grad_() for name in wanted}
    run = program.run_graph(tapped, tensors, {**state, **leaves}, collector)
    return _Eager(run, collector, leaves)


@dataclass(frozen=True)
class _Compiled:
    run: Run
    collector: Collector
    code: Compiled
    values: Values

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        if self.code.taps:
            for vector in vectors:
                self.collector.gradients(self.code.send_back(self.values, vector))
        self.collector.finish()

    def gradients(self, cotangent: Tensor) -> Sequence[Tensor | None]:
        return self.code.gradients(self.values, cotangent)


def _inductor(
    program: Program,
    tapped: Tapped,
    state: Mapping[str, Tensor],
    tensors: list[Tensor],
    wanted: Sequence[str],
    collector: Collector,
) -> Differentiable:
    arguments, names = [*state.values(), *tensors], list(state)
    places = tuple(names.index(name) for name in wanted)
    code = compiled(tapped, tuple(map(Kind.of, arguments)), places)
    values = code.run(arguments)
    for use, output in enumerate(code.outputs):
        collector.input(use, code.input(values, use), output)
    run = Run(tapped, values[code.prediction], program.signature.batch_size(tensors))
    return _Compiled(run, collector, code, code.read_later(values))


Backend = Callable[
    [Program, Tapped, Mapping[str, Tensor], list[Tensor], Sequence[str], Collector], Differentiable
]
BACKENDS: dict[str, Backend] = {"eager": _eager, "inductor": _inductor}


def backend_of(name: str) -> Backend:
    """The one of this name. Raises `OptionError`."""
    if name not in BACKENDS:
        raise OptionError(f"backend={name!r}; expected 'eager' or 'inductor'.")
    return BACKENDS[name]
