"""Calls and a reference -> times of the calls over those of the reference, taken in turn.

Whatever slows the machine for a while slows both, so that their ratio says more than seconds do.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxkfac.measure.elsewhere import Elsewhere

SHORTEST = 0.05  # seconds of the reference that are timed in one go
FEWEST = 3  # repeats

Call = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Times of a call over those of the reference just before it.

    Attributes:
        median, lower, upper: Median and quartiles of the ratios.
        repeats: How many there are.
        seconds: Median seconds of the call.
        gradient_seconds: Median seconds of the reference, a gradient.
        elsewhere: Cores that other processes kept busy meanwhile; `None` where none can tell.
    """

    median: float
    lower: float
    upper: float
    repeats: int
    seconds: float
    gradient_seconds: float
    elsewhere: float | None = None


def synchronize() -> None:
    """Wait for the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Call, times: int = 1) -> float:
    """Seconds of one call, averaged over several in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - start) / times


def interleaved(
    reference: Call, calls: Mapping[str, Call], repeats: int, budget: float
) -> dict[str, Ratio]:
    """Each call in turn, the reference before each.

    Args:
        reference: A gradient; run twice before any time counts.
        calls: By name; each should have run before.
        repeats: Most times of each call.
        budget: Seconds after which there are no more repeats than `FEWEST`.
    """
    seconds_of(reference)
    inner = max(1, round(SHORTEST / seconds_of(reference)))
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    start, elsewhere = time.perf_counter(), Elsewhere()
    for number in range(repeats):
        if number >= min(FEWEST, repeats) and time.perf_counter() - start > budget:
            break
        gc.collect()
        for name in _rotated(list(calls), number):
            before = seconds_of(reference, inner)
            pairs[name].append((seconds_of(calls[name], 1 if inner < 5 else 3), before))
    cores = elsewhere.cores() if calls else None
    return {name: replace(_ratio(pairs[name]), elsewhere=cores) for name in calls}


def _rotated(names: list[str], number: int) -> list[str]:
    """None is always the first, nor always behind the same one."""
    names = names if number % 2 == 0 else names[::-1]
    at = number % max(len(names), 1)
    return names[at:] + names[:at]


def _ratio(pairs: list[tuple[float, float]]) -> Ratio:
    ratios = sorted(seconds / before for seconds, before in pairs)
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    seconds, before = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Ratio(quartiles[1], quartiles[0], quartiles[2], len(ratios), seconds, before)
