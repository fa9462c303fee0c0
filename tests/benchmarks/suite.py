"""Problem by problem: compare, then time those that are equal, then first calls and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.compare import (
    EQUAL,
    attempt,
    averaged,
    distance,
    distance_of_inputs,
    distance_of_slopes,
    is_exact,
    slope_of,
    tolerance,
)
from benchmarks.interface import Factors
from benchmarks.measure import GRADIENT, First, gradient, in_fresh_process, size_of
from benchmarks.own import absent
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, STEP, Problem
from fxkfac.measure import Peak, Ratio, interleaved, later_peak, synchronize

TIMED, REFUSED, DIFFERS = "timed", "refused", "differs"
REFERENCE = "fxkfac"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        repeats: At most, in the place of each problem's own.
        budget: Seconds after which a problem and flavour is not repeated further.
        tiny: Take every problem at its tiny size.
        memory: Measure first calls and memory, in fresh processes.
    """

    problems: tuple[str, ...]
    flavours: tuple[str, ...]
    libraries: tuple[str, ...]
    repeats: int | None = None
    budget: float = 30.0
    tiny: bool = False
    memory: bool = True
    device: str = "cpu"
    threads: int = 2


@dataclass(frozen=True)
class Row:
    """A library at a problem and flavour.

    Attributes:
        status: `"timed"`, `"refused"` (by the library) or `"differs"` (in its factors).
        reason: Why it is not timed.
        difference: Largest relative distance to the reference over the layers, on the tiny size;
            random labels are averaged over, which leaves some of it.
    """

    problem: str
    flavour: str
    library: str
    status: str
    reason: str | None = None
    difference: float | None = None
    time: Ratio | None = None
    first: First | None = None
    first_of_gradient: First | None = None

    @property
    def memory(self) -> float | None:
        """Peak memory over the gradient's."""
        if not self.first or not self.first_of_gradient:
            return None
        mine, its = self.first.peak_mb, self.first_of_gradient.peak_mb
        return mine / its if mine is not None and its else None

    @property
    def memory_beside_factors(self) -> float | None:
        """Peak memory less the factors themselves, over the gradient's peak."""
        if self.memory is None or not self.first or not self.first_of_gradient:
            return None
        return self.memory - self.first.factors_mb / (self.first_of_gradient.peak_mb or 1)

    @property
    def first_ratio(self) -> float | None:
        """The first call over a gradient in the steady state."""
        if not self.first or not self.time:
            return None
        return self.first.seconds / self.time.gradient_seconds


def run(settings: Settings, say: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of one problem and flavour after the other, of what the installed fxkfac has."""
    settings = _there(settings, say)
    for problem in settings.problems:
        for flavour in settings.flavours:
            if flavour in PROBLEMS[problem].flavours and settings.libraries:
                yield _measured(problem, flavour, settings, say)


def _there(settings: Settings, say: Callable[[str], None]) -> Settings:
    missing = absent()
    for name in missing:
        if name in (*settings.flavours, *settings.libraries):
            say(f"{name}: not there, as there is no {missing[name]}")
    flavours = tuple(f for f in settings.flavours if f not in missing)
    libraries = tuple(n for n in settings.libraries if n not in missing)
    return replace(settings, flavours=flavours, libraries=libraries)


def _measured(
    problem: str, flavour: str, settings: Settings, say: Callable[[str], None]
) -> list[Row]:
    say(f"{problem}, {flavour}: comparing")
    rows = compared(problem, flavour, settings)
    names = [row.library for row in rows if row.status == TIMED]
    say(f"{problem}, {flavour}: timing {', '.join(names) or 'nothing'}")
    built = PROBLEMS[problem].make(settings.tiny, settings.device)
    calls, reasons = _calls(built, flavour, names)
    repeats = settings.repeats or PROBLEMS[problem].repeats
    only = {name: warm.call for name, warm in calls.items()}
    times = interleaved(gradient(built), only, repeats, settings.budget)
    rows = [_with_time(row, times, reasons) for row in rows]
    if settings.memory and flavour in PROBLEMS[problem].memory:
        say(f"{problem}, {flavour}: first calls and memory")
        if settings.device == "cpu":
            rows = _with_first(rows, settings)
        else:
            rows = _with_first_here(rows, built, calls, settings)
    gc.collect()
    return rows


def compared(problem: str, flavour: str, settings: Settings) -> list[Row]:
    """Every library beside the reference on the tiny size; status and difference are filled in.

    Factors of random labels are averaged over many calls and compared with the type-2 factors,
    which are their mean.
    """
    exact = flavour if is_exact(flavour) else "type-2"
    expected = _factors(REFERENCE, problem, exact, settings)
    return [_compared(name, problem, flavour, expected, settings) for name in settings.libraries]


def _factors(library: str, problem: str, flavour: str, settings: Settings) -> Factors:
    built = PROBLEMS[problem].make(True, settings.device)
    return averaged(PEERS[library].prepare(built, flavour), flavour)


def _compared(
    library: str, problem: str, flavour: str, expected: Factors, settings: Settings
) -> Row:
    found, reason = attempt(lambda: _factors(library, problem, flavour, settings))
    row = Row(problem, flavour, library, REFUSED, reason)
    if found is None:
        return row
    off, reason = attempt(lambda: distance(found, expected))
    if off is None:
        return replace(row, reason=reason)
    return _judged(row, off, tolerance(flavour))


def _judged(row: Row, off: float, limit: float) -> Row:
    if off <= limit:
        return replace(row, status=TIMED, difference=off)
    return replace(row, status=DIFFERS, difference=off, reason=f"factors differ by {off:.1e}")


@dataclass(frozen=True)
class Warm:
    """A library's call that has run once, the seconds until then, and the memory of its factors."""

    call: Callable[[], Any]
    seconds: float
    factors_mb: float


def _calls(
    built: Problem, flavour: str, names: list[str]
) -> tuple[dict[str, Warm], dict[str, str]]:
    """Those whose factors are those of the first at the full size, too; and why others' are not."""
    calls: dict[str, Warm] = {}
    reasons: dict[str, str] = {}
    expected: Factors = {}
    for name in names:
        result, reason = attempt(partial(_checked, name, built, flavour, expected))
        if result is None:
            reasons[name] = str(reason)
        else:
            calls[name], factors = result
            expected = expected or factors
    return calls, reasons


class Differs(Exception):
    """The results of a library are not those that are expected."""


def _checked(library: str, built: Problem, flavour: str, expected: Factors) -> tuple[Warm, Factors]:
    """A call that is warmed up, and its factors, which are those expected."""
    start = time.perf_counter()
    prepared = PEERS[library].prepare(built, flavour)
    result = prepared.call()
    synchronize()
    seconds = time.perf_counter() - start
    factors = prepared.read(result)
    _require("factors", _off(factors, expected or factors, flavour))
    if flavour == STEP:
        assert prepared.slope is not None
        _require("loss or gradients", distance_of_slopes(prepared.slope(result), slope_of(built)))
    return Warm(prepared.call, seconds, size_of(factors)), factors


def _off(found: Factors, expected: Factors, flavour: str) -> float:
    """Of all factors; of the inputs' alone where labels are drawn."""
    return (distance if is_exact(flavour) else distance_of_inputs)(found, expected)


def _require(what: str, off: float) -> None:
    if not off <= EQUAL:
        raise Differs(f"{what} differ by {off:.1e} at the full size")


def _with_time(row: Row, times: dict[str, Ratio], reasons: dict[str, str]) -> Row:
    if row.library in reasons:
        differs = reasons[row.library].startswith("Differs")
        return replace(row, status=DIFFERS if differs else REFUSED, reason=reasons[row.library])
    return replace(row, time=times.get(row.library))


def _with_first_here(
    rows: list[Row], built: Problem, calls: Mapping[str, Warm], settings: Settings
) -> list[Row]:
    """In this process: what is allocated on a GPU is known, whatever was there before."""
    peak, plain = Peak(settings.device), gradient(built)
    gradients = First(0.0, later_peak(plain, peak), 0.0)
    result = []
    for row in rows:
        warm = calls.get(row.library)
        memory = later_peak(warm.call, peak) if warm else None
        first = First(warm.seconds, memory, 0.0, warm.factors_mb) if warm else None
        result.append(replace(row, first=first, first_of_gradient=gradients))
    return result


def _with_first(rows: list[Row], settings: Settings) -> list[Row]:
    """The gradient's process is started once for all libraries."""

    def fresh(library: str) -> tuple[First | None, str | None]:
        where = rows[0].problem, rows[0].flavour, library
        how = settings.tiny, settings.device, settings.threads
        return attempt(lambda: in_fresh_process(*where, *how))

    if not any(row.time for row in rows):
        return rows
    gradients, _ = fresh(GRADIENT)
    result = []
    for row in rows:
        first, reason = fresh(row.library) if row.time else (None, row.reason)
        result.append(replace(row, first=first, reason=reason, first_of_gradient=gradients))
    return result
