"""One batch after the other -> sums: run the tapped graph into a sink, send vectors back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Generator, Tensor

from fxkfac.curvature.accumulated import Accumulated
from fxkfac.curvature.backends import Backend, Differentiable, Forward, backend_of
from fxkfac.curvature.backpropagation import BY_POSITION, backpropagated_vectors
from fxkfac.curvature.collect import Collector
from fxkfac.curvature.diagonal import gradient_moments, positions_in_datum
from fxkfac.curvature.factors import Factors, Settings
from fxkfac.curvature.likelihoods import Likelihood
from fxkfac.curvature.padding import Mask, Padding, ignored_positions, read_mask
from fxkfac.curvature.perdatum import zero_moment
from fxkfac.curvature.receive import Receiver
from fxkfac.curvature.schedule import Schedule, schedule_of
from fxkfac.curvature.together import MEMORY, require_memory
from fxkfac.errors import DataError, NonFiniteError
from fxkfac.functional import Params
from fxkfac.graph.program import Program, Run
from fxkfac.graph.structure import EXACT
from fxkfac.isolation import is_finite, own_randomness


class Sums(Protocol):
    """What a pass adds up."""

    n: int

    def merge(self, other: Self) -> None:
        """Add the sums of further data, which are used up."""
        ...

    def not_finite(self) -> str | None:
        """What holds NaN or Inf, if anything does."""
        ...


Sink = TypeVar("Sink", bound=Receiver)
Total = TypeVar("Total", bound=Sums)


@dataclass(frozen=True)
class Batch:
    """One batch that has run.

    Attributes:
        inputs: The data.
        schedule: What happens with the taps.
        run: The graph and its prediction.
        count: What `reduction="mean"` divides by.
        vectors: The backpropagated vectors ▲, anew at every call.
    """

    inputs: Any
    schedule: Schedule
    run: Run
    count: float
    vectors: Callable[[], Iterator[Tensor]]


@dataclass
class Pass(ABC, Generic[Sink, Total]):
    """One pass over the data.

    Attributes:
        backend: What runs the graph.
        memory: Bytes for the gradients of vectors that go back together.
        state: Parameters and buffers.
        wanted: Names of the parameters that ask for gradients.
        total: The sums of all batches so far; a batch that fails adds nothing.
    """

    program: Program
    likelihood: Likelihood
    settings: Settings
    params: Params | None
    mask: Mask | None
    generator: Generator
    backend: str = "eager"
    memory: int | None = None
    total: Total | None = None
    state: Mapping[str, Tensor] = field(init=False)
    wanted: tuple[str, ...] = field(init=False, default=())
    _forward: Backend = field(init=False)

    def __post_init__(self) -> None:
        self._forward = backend_of(self.backend)
        require_memory(self.memory)
        self.state = self.program.state(self.params)

    @abstractmethod
    def sink(self, schedule: Schedule, padding: Padding, memory: int, targets: Any) -> Sink:
        """What the taps of one batch go into."""

    @abstractmethod
    def sums(self, sink: Sink, batch: Batch) -> Total:
        """What the sink has of a batch."""

    def add_all(self, data: Iterable[tuple[Any, Any]]) -> None:
        """Add all batches."""
        for number, (inputs, targets) in enumerate(data):
            self.add(inputs, targets, number)

    def add(self, inputs: Any, targets: Any, number: int) -> None:
        """Add one batch."""
        generator = self.generator
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with own_randomness(seed):  # dropout draws from the global state, which is the caller's
            part = self._sums(inputs, targets, number)
        if (found := part.not_finite()) is not None:
            raise NonFiniteError(
                f"{found} holds NaN or Inf after batch {number}; expected finite numbers. "
                "Compute in a wider dtype, or look at this layer."
            )
        if self.total is None:
            self.total = part
        else:
            self.total.merge(part)

    def _sums(self, inputs: Any, targets: Any, number: int) -> Total:
        likelihood, settings = self.likelihood, self.settings
        with _named(number):
            tapped, tensors = self.program.at(inputs)
        schedule = schedule_of(
            self.program, tapped, settings.structures, settings.separate_weight_and_bias
        )
        n = self.program.signature.batch_size(tensors)
        given = None if self.mask is None else read_mask(self.mask, inputs, targets, n)
        padding = Padding(given)
        memory = MEMORY if self.memory is None else self.memory
        sink = self.sink(schedule, padding, memory, targets)
        with _named(number):
            ran = self._forward(
                Forward(self.program, tapped, self.state, tensors, self.wanted, sink)
            )
        run, prediction = ran.run, ran.run.prediction.detach()
        _require_finite_prediction(prediction, number)
        likelihood.validate(prediction, targets)
        if sink.hold:
            padding.ignored = ignored_positions(likelihood, run, targets)
        vectors = partial(self._vectors, run, targets)
        self._send_back(ran, targets, vectors())
        count = float(likelihood.count(prediction, targets))
        return self.sums(sink, Batch(inputs, schedule, run, count, vectors))

    def _send_back(self, ran: Differentiable, targets: Any, vectors: Iterable[Tensor]) -> None:
        ran.send_back(vectors)

    def _vectors(self, run: Run, targets: Any) -> Iterator[Tensor]:
        """The backpropagated vectors ▲, of the prediction's shape."""
        fisher = self.settings.fisher
        return backpropagated_vectors(
            fisher,
            self.likelihood,
            run.prediction.detach(),
            targets,
            positions_in_datum(run) if fisher in BY_POSITION else None,
            self.settings.mc_samples,
            self.generator,
        )


@dataclass
class FactorPass(Pass[Collector, Accumulated]):
    """The pass that sums A and B."""

    def run(self, data: Iterable[tuple[Any, Any]]) -> Factors:
        """Add all batches. What stops that carries the factors of those before."""
        try:
            self.add_all(data)
        except BaseException as error:
            if self.total is not None:
                error.factors = self.factors()  # type: ignore[attr-defined]
                n = self.total.n
                error.add_note(f"The factors of the first {n} data are in this error's .factors.")
            raise
        factors = self.factors()
        self.likelihood.reduction_factor(factors.count)  # refuses data without any target
        return factors

    def factors(self) -> Factors:
        """What was added so far."""
        assert self.total is not None
        return self.total.factors(self.settings, self.program.model, self.likelihood)

    def sink(self, schedule: Schedule, padding: Padding, memory: int, targets: Any) -> Collector:
        """A and B; A waits where targets are ignored, and no mask says which rows are real."""
        return Collector(
            schedule=schedule,
            settings=self.settings,
            padding=padding,
            memory=memory,
            hold=self.mask is None and self.likelihood.ignores(targets),
            keep_graph=bool(self.wanted),
        )

    def sums(self, sink: Collector, batch: Batch) -> Accumulated:
        """A, B and the exact blocks."""
        exact = sink.exact | self._without_taps(batch)
        for name, kind in self.settings.structures.items():
            if kind in EXACT and name not in exact:  # nothing uses it, or nothing comes back to it
                exact[name] = zero_moment(
                    self.settings.parameters[name], kind, batch.run.prediction.detach()
                )
        return Accumulated(
            batch.schedule, batch.run.n, batch.count, sink.inputs, sink.outputs, exact
        )

    def _without_taps(self, batch: Batch) -> dict[str, Tensor]:
        """Exact blocks of parameters that have no normal form."""
        if not batch.schedule.from_graph:
            return {}
        kinds = {name: self.settings.structures[name] for name in batch.schedule.from_graph}
        return gradient_moments(
            self.program, batch.run, self.state, batch.inputs, kinds, batch.vectors()
        )


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Say of which batch the data are wrong."""
    try:
        yield
    except DataError as error:
        raise DataError(f"batch {number}: {error}") from None


def _require_finite_prediction(prediction: Tensor, number: int) -> None:
    if not is_finite(prediction):
        raise NonFiniteError(
            f"the prediction for batch {number} holds NaN or Inf; expected finite numbers. "
            "Look at the parameters, or at the data of this batch."
        )
