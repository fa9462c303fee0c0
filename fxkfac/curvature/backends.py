"""One batch forwards and backwards, into a sink: by autograd as it goes, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Generator, Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.inductor.code import Values
from fxkfac.curvature.inductor.compiled import Compiled, compiled
from fxkfac.curvature.inductor.inside import is_fixed, is_open
from fxkfac.curvature.inductor.traced import Kind
from fxkfac.curvature.inductor.whole import Objective, Outcome, Whole, is_whole, whole
from fxkfac.curvature.receive import Receiver
from fxkfac.curvature.slope import Slope, batch_slope
from fxkfac.curvature.together import gradients_of
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program
from fxkfac.graph.tapped import Run, Tapped
from fxkfac.likelihoods.base import Likelihood
from fxkfac.likelihoods.closed_form import ClosedForm


class Differentiable(Protocol):
    """A batch that has run forwards."""

    @property
    def run(self) -> Run:
        """The graph and its prediction."""
        ...

    def require_fit(self) -> None:
        """Raise `DataError` unless the targets fit the prediction."""
        ...

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        """Backpropagate vectors into the sink, one after the other."""
        ...

    def slope(self) -> Slope:
        """The criterion and its gradients."""
        ...


@dataclass(frozen=True)
class Forward:
    """What a batch is run with.

    Attributes:
        state: Parameters and buffers.
        tensors: The data.
        wanted: Names of the parameters that ask for gradients.
        receiver: What receives the taps.
        likelihood: Whose criterion is differentiated.
        targets: As it takes them.
        generator: Where labels are drawn from.
    """

    program: Program
    tapped: Tapped
    state: Mapping[str, Tensor]
    tensors: list[Tensor]
    wanted: Sequence[str]
    receiver: Receiver
    likelihood: Likelihood
    targets: Any
    generator: Generator

    def require_fit(self, prediction: Tensor) -> None:
        """Raise `DataError` unless the targets fit."""
        self.likelihood.validate(prediction.detach(), self.targets)

    def slope(
        self, prediction: Tensor, gradients: Callable[[Tensor], Sequence[Tensor | None]]
    ) -> Slope:
        """By what gives ⟨cotangent, f⟩'s gradients."""
        underflows = self.tapped.captured.underflows
        return batch_slope(self.likelihood, prediction, self.targets, gradients, underflows)


@dataclass(frozen=True)
class _Eager:
    batch: Forward
    run: Run
    leaves: Sequence[Tensor]

    def require_fit(self) -> None:
        self.batch.require_fit(self.run.prediction)

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        self.batch.receiver.send_back(self.run.prediction, vectors)

    def slope(self) -> Slope:
        f = self.run.prediction
        return self.batch.slope(f, partial(gradients_of, f, self.leaves))


def _eager(batch: Forward) -> Differentiable:
    leaves = {name: batch.state[name].detach().requires_grad_() for name in batch.wanted}
    state = {**batch.state, **leaves}
    run = batch.program.run_graph(batch.tapped, batch.tensors, state, batch.receiver)
    return _Eager(batch, run, list(leaves.values()))


@dataclass(frozen=True)
class _Compiled:
    batch: Forward
    run: Run
    sink: Collector | None  # the receiver, where the code has its sums inside
    code: Compiled
    values: Values

    def require_fit(self) -> None:
        self.batch.require_fit(self.run.prediction)

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        if self.code.hears:
            for vector in vectors:
                if self.sink is None:
                    receiver = self.batch.receiver
                    sent = self.code.send_back(self.values, receiver.enlarge(vector))
                    receiver.gradients(sent)
                else:
                    self.code.add_gradients(self.values, vector, self.sink)
        self.batch.receiver.finish()

    def slope(self) -> Slope:
        gradients = partial(self.code.gradients, self.values)
        return self.batch.slope(self.run.prediction, gradients)


@dataclass(frozen=True)
class _Whole:
    run: Run
    sink: Collector
    code: Whole
    outcome: Outcome

    def require_fit(self) -> None:
        """They did before the code ran."""

    def send_back(self, vectors: Iterable[Tensor]) -> None:
        """What was sent back has come."""
        self.code.gradients.give(self.outcome.values, self.sink)
        self.sink.finish()

    def slope(self) -> Slope:
        return Slope(self.outcome.criterion, self.outcome.wanted, self.outcome.scale)


def _inductor(batch: Forward) -> Differentiable:
    captured = batch.tapped.captured
    # Compiled code reads memory as it is, and not the bit that says that it is to be negated.
    arguments = [t.resolve_neg() for t in (*captured.arguments(batch.state), *batch.tensors)]
    kinds = tuple(map(Kind.of, arguments))
    places = tuple(captured.names.index(n) for n in batch.wanted)
    sink = batch.receiver if is_fixed(batch.receiver) else None
    n = batch.program.signature.batch_size(batch.tensors)
    if sink is not None and (objective := _objective(batch, sink)) is not None:
        every = whole(batch.tapped, kinds, places, sink, objective)
        outcome = every.run(objective, arguments)
        every.inputs.give(outcome.values, sink)
        return _Whole(Run(batch.tapped, outcome.prediction, n), sink, every, outcome)
    if sink is not None and not is_open(sink.schedule, arguments[0].device):
        sink = None  # of several vectors, wide sums are faster outside: added in place
    code = compiled(batch.tapped, kinds, places, sink)
    values = code.run(arguments)
    if sink is not None:
        code.inputs.give(values, sink)
    for use, output in enumerate(code.outputs):
        batch.receiver.input(use, code.input(values, use), output)
    run = Run(batch.tapped, values[code.prediction], n)
    return _Compiled(batch, run, sink, code, code.read_later(values))


def _objective(batch: Forward, sink: Collector) -> Objective | None:
    """What goes back, where all of it can be in the code."""
    likelihood, y = batch.likelihood, batch.targets
    if not is_whole(sink.settings):
        return None
    if not isinstance(likelihood, ClosedForm) or not isinstance(y, Tensor):
        return None
    if type(likelihood).sample is not ClosedForm.sample:  # labels of another kind
        return None
    return Objective(likelihood, y.resolve_neg(), batch.generator)


Backend = Callable[[Forward], Differentiable]
BACKENDS: dict[str, Backend] = {"eager": _eager, "inductor": _inductor}


def backend_of(name: str) -> Backend:
    """The one of this name. Raises `OptionError`."""
    if name not in BACKENDS:
        raise OptionError(f"backend={name!r}; expected 'eager' or 'inductor'.")
    return BACKENDS[name]
