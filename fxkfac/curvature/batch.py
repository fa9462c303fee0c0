"""One batch after the other -> sums: run the tapped graph into a sink, send vectors back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Generator, Tensor

from fxkfac.curvature.backends import Backend, Differentiable, Forward, backend_of
from fxkfac.curvature.diagonal import positions_in_datum
from fxkfac.curvature.padding import (
    Mask,
    Padding,
    chosen_by_values,
    ignored_positions,
    read_mask,
    require_mask,
)
from fxkfac.curvature.receive import Receiver
from fxkfac.curvature.schedule import Schedule, schedule_of
from fxkfac.curvature.settings import Settings
from fxkfac.curvature.together import require_memory
from fxkfac.errors import DataError, FxkfacError, NonFiniteError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.graph.tapped import Run, Tapped
from fxkfac.isolation import is_finite, own_randomness, seed_from
from fxkfac.likelihoods.backpropagation import BY_POSITION, backpropagated_vectors, sends_back
from fxkfac.likelihoods.base import Likelihood, count_of
from fxkfac.likelihoods.losses import BUILT_IN
from fxkfac.ranges import require_generator


class Sums(Protocol):
    """What a pass adds up."""

    n: int

    def merge(self, other: Self) -> None:
        """Add the sums of further data, which are used up."""
        ...

    def require_same_terms(self, other: Self) -> None:
        """Raise `MergeError` unless further data are of the same terms."""
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
        total: The sums of all batches so far.
        batches: How many there were.
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
    batches: int = 0
    state: Mapping[str, Tensor] = field(init=False)
    wanted: tuple[str, ...] = field(init=False, default=())
    _forward: Backend = field(init=False)
    _whole: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._forward = backend_of(self.backend)
        self.memory = require_memory(self.memory)
        require_generator(self.generator)
        require_mask(self.mask)
        self.state = self.program.state(self.params)

    @abstractmethod
    def sink(self, schedule: Schedule, padding: Padding, targets: Any) -> Sink:
        """What the taps of one batch go into."""

    @abstractmethod
    def sums(self, sink: Sink, batch: Batch) -> Total:
        """What the sink has of a batch."""

    def add_all(self, data: Iterable[tuple[Any, Any]]) -> None:
        """Add all batches."""
        for inputs, targets in data:
            self.add(inputs, targets)

    def add(self, inputs: Any, targets: Any) -> None:
        """Add one batch; one that fails adds nothing, and has drawn nothing."""
        self.require_whole()
        before = self.generator.get_state()
        self._whole = False
        try:
            part = self._finite_sums(inputs, targets)
        except BaseException:
            self.generator.set_state(before)
            self._whole = True
            raise
        if self.total is None:
            self.total = part
        else:
            self.total.merge(part)
        self.batches += 1
        self._whole = True

    def require_whole(self) -> None:
        """Raise `FxkfacError` where the last batch was added in part: sums change in place."""
        if not self._whole:
            raise FxkfacError(
                f"the accumulation was interrupted while batch {self.batches} was being added to "
                "the sums, which hold a part of it; expected whole batches. Go on from where it "
                "was saved last, by fxkfac.resume."
            )

    def _schedule(self, tapped: Tapped) -> Schedule:
        settings = self.settings
        return schedule_of(
            self.program, tapped, settings.structures, settings.separate_weight_and_bias
        )

    def _finite_sums(self, inputs: Any, targets: Any) -> Total:
        """The sums of one batch, which fit to those so far."""
        number = self.batches
        with _named(number):
            tapped, tensors = self.program.at(inputs, self.state)
        with self._randomness(tapped):
            part = self._sums(tapped, tensors, inputs, targets)
        if (found := part.not_finite()) is not None:
            raise NonFiniteError(
                f"{found} holds NaN or Inf after batch {number}; expected finite numbers. "
                "Compute in a wider dtype, or look at this layer."
            )
        if self.total is not None:
            self.total.require_same_terms(part)
        return part

    def _randomness(self, tapped: Tapped) -> AbstractContextManager[None]:
        """Dropout draws from the global state, which is the caller's; so may what they wrote."""
        seed = seed_from(self.generator)
        theirs = type(self.likelihood) not in BUILT_IN or callable(self.mask)
        return own_randomness(seed) if theirs or tapped.may_draw else nullcontext()

    def _sums(self, tapped: Tapped, tensors: list[Tensor], inputs: Any, targets: Any) -> Total:
        likelihood, number = self.likelihood, self.batches
        schedule = self._schedule(tapped)
        schedule.require_factors()
        n = self.program.signature.batch_size(tensors)
        given = None if self.mask is None else read_mask(self.mask, inputs, targets, n)
        padding = Padding(given, chosen=chosen_by_values(tapped))
        sink = self.sink(schedule, padding, targets)
        with _named(number):
            ran = self._forward(self._batch(tapped, tensors, targets, sink))
            run, prediction = ran.run, ran.run.prediction.detach()
            require_finite_prediction(prediction, number)
            ran.require_fit()
        if sink.hold:
            padding.ignored = ignored_positions(likelihood, run, targets)
        vectors = partial(self._vectors, run, targets)
        sent = vectors()
        if sink.hold and not sends_back(self.settings.fisher):
            sent = iter([likelihood.gradient(prediction, targets)])  # it tells what is padding
        self._send_back(ran, sent)
        count = count_of(likelihood, prediction, targets)
        return self.sums(sink, Batch(inputs, schedule, run, count, vectors))

    def _batch(
        self, tapped: Tapped, tensors: list[Tensor], targets: Any, sink: Receiver
    ) -> Forward:
        return Forward(
            program=self.program,
            tapped=tapped,
            state=self.state,
            tensors=tensors,
            wanted=self.wanted,
            receiver=sink,
            likelihood=self.likelihood,
            targets=targets,
            generator=self.generator,
        )

    def _send_back(self, ran: Differentiable, vectors: Iterable[Tensor]) -> None:
        ran.send_back(vectors)

    def _vectors(self, run: Run, targets: Any) -> Iterator[Tensor]:
        """The backpropagated vectors ▲, of the prediction's shape."""
        fisher = self.settings.fisher
        return backpropagated_vectors(
            fisher,
            self.likelihood,
            run.prediction.detach(),
            targets,
            _positions(run) if fisher in BY_POSITION else None,
            self.settings.mc_samples,
            self.generator,
        )


def _positions(run: Run) -> Tensor:
    """For every entry of the prediction, its position within its own datum.

    Data that depend on each other, or may, are one datum: what several of them send back at once
    would meet at the taps, in a sum that hangs on the choice of the square root.
    """
    own = positions_in_datum(run)
    if run.tapped.coupled or run.tapped.alike:
        return torch.arange(own.numel(), device=own.device).view(own.shape)
    return own


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Say of which batch the data are wrong, or at which one the model itself has failed."""
    try:
        yield
    except DataError as error:
        raise DataError(f"batch {number}: {error}") from None
    except Exception as error:
        error.add_note(f"That was batch {number}.")
        raise


def require_finite_prediction(prediction: Tensor, number: int) -> None:
    """Raise `NonFiniteError` unless the prediction for a batch is finite."""
    if not is_finite(prediction):
        raise NonFiniteError(
            f"the prediction for batch {number} holds NaN or Inf; expected finite numbers. "
            "Look at the parameters, or at the data of this batch."
        )
