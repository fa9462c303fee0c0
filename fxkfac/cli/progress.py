"""How far a pass over the data is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxkfac.cli.output import say
from fxkfac.curvature.data import batches, number_of_batches

INTERVAL = 5.0  # seconds between two lines
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Shown:
    """Data whose passes are shown, and begin in the same random state each.

    So a loader that shuffles does so in the same way each time.

    Attributes:
        data: One (inputs, targets) pair, or an iterable of them.
        what: What they are for.
        state: The random state in which a pass begins: now.
    """

    data: Any
    what: str
    state: Tensor = field(default_factory=torch.get_rng_state, repr=False)

    def __iter__(self) -> Iterator[Pair]:
        torch.set_rng_state(self.state)
        total, pairs = number_of_batches(self.data), batches(self.data)
        bar = _bar(pairs, self.what, total) if sys.stderr.isatty() else None
        yield from _lines(pairs, self.what, total) if bar is None else bar


def _bar(pairs: Iterator[Pair], what: str, total: int | None) -> Iterable[Pair] | None:
    """By tqdm, where it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(pairs, desc=what, total=total, unit="batch", file=sys.stderr)


def _lines(pairs: Iterator[Pair], what: str, total: int | None) -> Iterator[Pair]:
    start = last = time.perf_counter()
    of = "" if total is None else f" of {total}"
    for done, pair in enumerate(pairs):
        now = time.perf_counter()
        if now - last >= INTERVAL:
            say(f"{what}: {done}{of} batches in {now - start:.0f} s")
            last = now
        yield pair
