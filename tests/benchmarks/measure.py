"""Time interleaved in one process, first call and peak memory in a fresh process each.

time        seconds of a call over seconds of `torch.autograd.grad` just before it; median and
            quartiles of the repeats.
first call  in a fresh process, libraries imported: capture, matching, installing of hooks and
            the first factors.
memory      in that process, after the first call: the highest resident set during a call, less
            what is resident before it (model, data, and what the library keeps from call to
            call); median of up to three. On a GPU the highest allocated memory in its place.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.elsewhere import Elsewhere
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, Problem

GRADIENT = "gradient"
SHORTEST = 0.05  # seconds of gradients that are timed in one go
FEWEST = 3  # repeats
MEMORY_CALLS, MEMORY_SECONDS = 3, 3.0  # at most
MB = 2**20


@dataclass(frozen=True)
class Ratio:
    """Times over the gradient's, and the cores that other processes kept busy meanwhile."""

    median: float
    lower: float
    upper: float
    repeats: int
    seconds: float
    gradient_seconds: float
    elsewhere: float | None = None


@dataclass(frozen=True)
class First:
    """Of a fresh process: seconds of the first call, and peaks in MB above what is held before.

    `peak_mb` is of a later call, `first_peak_mb` of the first one with the capture; `factors_mb`
    is what the factors themselves take, with a bias the blocks that it has of its own left out.
    """

    seconds: float
    peak_mb: float | None
    first_peak_mb: float
    factors_mb: float = 0.0


def gradient(problem: Problem) -> Callable[[], Any]:
    """`torch.autograd.grad` of the loss, for every batch."""
    params = problem.params

    def call() -> Any:
        for x, y in problem.batches:
            result = torch.autograd.grad(problem.loss(problem.model(x), y), params)
        return result

    return call


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], times: int = 1) -> float:
    """Seconds of one call, averaged over several in a row."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize()
    return (time.perf_counter() - start) / times


def interleaved(
    reference: Callable[[], Any], calls: dict[str, Callable[[], Any]], repeats: int, budget: float
) -> dict[str, Ratio]:
    """Each call in turn, a gradient before each; few repeats once the budget is spent."""
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


class Peak:
    """The highest memory since `start`, above what was held then."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.resets = device != "cpu", True

    def start(self) -> None:
        """Give freed memory back to the system and begin anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MB
            return
        _trim()
        self.resets = _reset_high_water()
        self.before = _resident() if self.resets else _high_water()

    def above(self) -> float:
        """In MB."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / MB - self.before
        return _high_water() - self.before


def _trim() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_high_water() -> bool:
    """Linux forgets the highest resident set; elsewhere only a process's first peak is known."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def _high_water() -> float:
    """VmHWM, which is what `getrusage` calls ru_maxrss."""
    status = Path("/proc/self/status")
    if not status.exists():
        scale = MB if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def first_call(problem: str, flavour: str, library: str, tiny: bool, device: str) -> First:
    """To be called in a fresh process."""
    built = PROBLEMS[problem].make(tiny, device)
    if library != GRADIENT and (module := PEERS[library].module):
        __import__(module)
    peak = Peak(device)
    peak.start()
    start = time.perf_counter()
    prepared = None if library == GRADIENT else PEERS[library].prepare(built, flavour)
    call = prepared.call if prepared else gradient(built)
    call()
    _synchronize()
    seconds, first_peak = time.perf_counter() - start, peak.above()
    peaks = []
    end = time.perf_counter() + MEMORY_SECONDS
    while not peaks or (len(peaks) < MEMORY_CALLS and time.perf_counter() < end):
        peak.start()
        call()
        peaks.append(peak.above())
    later = statistics.median(peaks) if peak.on_gpu or peak.resets else None
    factors = prepared.read(call()) if prepared else {}
    return First(seconds, later, first_peak, sum(map(_size, factors.values())))


def _size(factors: Iterable[torch.Tensor]) -> float:
    return sum(f.numel() * f.element_size() for f in factors) / MB


def in_fresh_process(
    problem: str, flavour: str, library: str, tiny: bool, device: str, threads: int
) -> First:
    """Run `first_call` in a process of its own."""
    words = [problem, flavour, library, device, str(int(tiny)), str(threads)]
    root, above = Path(__file__).parents[2], Path(__file__).parents[1]
    paths = [str(above), str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # or a compiled first call would be a later one
    }
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no output"])[-1])
    return First(**json.loads(ended.stdout.splitlines()[-1]))


def _main() -> None:
    parser = argparse.ArgumentParser(description="One first call, as JSON.")
    for name in ("problem", "flavour", "library", "device"):
        parser.add_argument(name)
    parser.add_argument("tiny", type=int)
    parser.add_argument("threads", type=int)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(json.dumps(asdict(first_call(a.problem, a.flavour, a.library, bool(a.tiny), a.device))))


if __name__ == "__main__":
    _main()
