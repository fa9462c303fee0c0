"""A sink that hears of gradients: what a pass over the data sends back, and who is told.

It makes every output a tap, sends vectors back through the graph of one forward pass, as many at a
time as memory allows, and says of which rows none counts. What is summed of inputs and gradients,
its kinds know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fxkfac.curvature.padding import Padding
from fxkfac.curvature.schedule import Schedule
from fxkfac.curvature.settings import Settings
from fxkfac.curvature.sharing import Kept, chosen_groups, rows_kept
from fxkfac.curvature.together import (
    FEW,
    Heard,
    Unpack,
    chunks,
    digest,
    enlarged,
    goes_together,
    listened,
    memory_on,
    reduced,
    send_back,
)
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, Routed
from fxkfac.likelihoods.backpropagation import has_several

Key = TypeVar("Key")
Given = TypeVar("Given")


class Awaited(Generic[Key, Given]):
    """What several uses give together: complete when each has given its part."""

    def __init__(self) -> None:
        self._parts: dict[Key, list[Given]] = {}

    def add(self, key: Key, part: Given, expected: int) -> list[Given]:
        """Add one part; all of them when it is the last one, else none."""
        parts = self._parts.setdefault(key, [])
        parts.append(part)
        return self._parts.pop(key) if len(parts) == expected else []

    def rest(self) -> Iterator[tuple[Key, list[Given]]]:
        """What stays incomplete, since no gradient arrives at some uses."""
        while self._parts:
            yield self._parts.popitem()


@dataclass(kw_only=True)
class Receiver(ABC):
    """The sink of one batch.

    Attributes:
        hold: Whether only the gradients tell which rows are padding.
        keep_graph: Whether the graph is needed when all vectors have been sent back, for gradients
            of parameters.
        memory: Bytes that the gradients of vectors which go back together may take at all taps;
            `None` for what pays on their device.
    """

    schedule: Schedule
    settings: Settings
    padding: Padding
    memory: int | None
    hold: bool = False
    keep_graph: bool = False
    _root: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    _listens: bool = True
    _vectors: int = 1  # that are going back
    _bytes: int = 0  # of one vector's gradients
    _trial: Heard | None = None  # in the place of sums, while vectors are tried
    _power: Tensor | None = None  # by which they are larger than they should be
    _kept: dict[Use, Kept] = field(default_factory=dict)
    _groups: dict[Use, Tensor] = field(default_factory=dict)

    # --- what the kinds do ---

    @abstractmethod
    def take_input(self, use: Use, x: Input, y: Tensor) -> None:
        """Sum an input, or keep it for later, detached; `_kept` knows which rows count."""

    @abstractmethod
    def take_gradient(self, use: Use, g: Tensor) -> None:
        """Sum the gradients of all vectors that go back together, in the first axis."""

    @abstractmethod
    def finish_vectors(self) -> None:
        """These vectors have been sent back: what has not arrived is zero."""

    def finish(self) -> None:
        """All vectors have been sent back."""
        self.padding.require_fit()

    # --- what the tapped graph hands over ---

    def output(self, place: int, y: Tensor) -> Tensor:
        """Make it a tap, and listen for its gradient."""
        self._bytes += y.nbytes
        return listened(self._root, y, partial(self._hear, place), not self.keep_graph)

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Take the input of a use, and find out which of its rows count."""
        entered = self.schedule.tapped.uses[use]
        if entered not in self.schedule.heard:
            return
        with torch.no_grad():
            if isinstance(x, Routed):
                self._groups[entered] = chosen_groups(entered, x, y)
            # Rows of padding that only gradients tell have none, and add nothing to B in any case.
            groups = self._groups.get(entered)
            self._kept[entered] = groups if self.hold else self.rows_that_count(entered, y)
            self.take_input(entered, x, y)

    def rows_that_count(self, use: Use, y: Tensor) -> Kept:
        """Which rows of a use count, as far as is known by now."""
        return rows_kept(self.padding.real(use, y), self._groups.get(use))

    # --- what the batch does with it ---

    def send_back(self, prediction: Tensor, vectors: Iterable[Tensor]) -> None:
        """Backpropagate vectors, some at a time, through the graph of the one forward pass."""
        if prediction.requires_grad:
            for part, is_last in chunks(vectors, self._at_once(prediction)):
                self._vectors = len(part)
                together = torch.stack(part) if len(part) > 1 else part[0].unsqueeze(0)
                together = self.enlarge(together)
                send_back(prediction, self._root, together, self.keep_graph or not is_last)
                self.finish_vectors()
        self._listens = False
        self.finish()

    def enlarge(self, vectors: Tensor) -> Tensor:
        """What is sent back in the place of vectors: what `_tell` hears is made small again."""
        underflows = self.schedule.tapped.captured.underflows
        vectors, self._power = enlarged(vectors, underflows)
        return vectors

    def gradients(self, arrived: dict[int, Tensor]) -> None:
        """In the place of backpropagation: what one vector's gradients are, at every tap."""
        with torch.no_grad():
            while arrived:  # each one is let go once it is summed
                place, g = arrived.popitem()
                self._tell(place, g.unsqueeze(0))
            self.finish_vectors()

    def _at_once(self, prediction: Tensor) -> int:
        """How many vectors go back together."""
        if not has_several(self.settings.fisher, self.settings.mc_samples):
            return 1
        memory = memory_on(prediction.device) if self.memory is None else self.memory
        size = memory // max(self._bytes, 1)
        if size < FEW:
            return 1
        key = ("together", prediction.device, prediction.dtype)  # kernels differ, and their rules
        return size if self.schedule.tapped.once(key, lambda: self._go_together(prediction)) else 1

    def _go_together(self, prediction: Tensor) -> bool:
        """Whether vectors can, which a trial says that no sum hears."""

        def listen(vectors: int) -> Heard:
            self._vectors, self._trial = vectors, {}
            return self._trial

        try:
            lowest = self.schedule.tapped.captured.lowest
            return goes_together(prediction, self._root, listen, lowest)
        finally:
            self._trial = None

    def _hear(self, place: int, g: Tensor) -> None:
        if self._vectors > 1:
            Unpack.apply(g, partial(self._tell, place), self._vectors)
        else:
            self._tell(place, g.unsqueeze(0))

    def _tell(self, place: int, g: Tensor) -> None:
        if not self._listens:
            return
        if self._trial is not None:
            self._trial[place] = digest(g)
            return
        g = reduced(g, self._power)
        for use in self.schedule.at_tap.get(place, ()):
            self.take_gradient(use, g)
