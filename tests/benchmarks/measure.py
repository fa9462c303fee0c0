"""Time interleaved in one process, first call and peak memory in a fresh process each.

time        seconds of a call over seconds of `torch.autograd.grad` just before it; median and
            quartiles of the repeats.
first call  in a fresh process, libraries imported: capture, matching, installing of hooks and
            the first factors.
memory      in another one, after the first call: the highest resident set during a call, less
            what is resident before it (model, data, and what the library keeps from call to
            call); median of up to three. Each tensor has pages of its own there, which go back when
            it is freed: of these malloc keeps more or less from process to process, and for small
            calls up to 0.8 times as much again as they need.

On a GPU both are of the process that also takes the times, and memory is what is allocated there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.interface import Factors
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, Problem
from fxkfac.measure import MB, Peak, later_peak, synchronize

GRADIENT = "gradient"
# Bytes from which on glibc maps memory: its own number, which grows with what is freed unless set.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


@dataclass(frozen=True)
class First:
    """Of fresh processes: seconds of the first call, and peaks in MB above what is held before.

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
    synchronize()
    seconds, first_peak = time.perf_counter() - start, peak.above()
    later = later_peak(call, peak)
    factors = prepared.read(call()) if prepared else {}
    return First(seconds, later, first_peak, size_of(factors))


def size_of(factors: Factors) -> float:
    """The memory that factors take, in MB."""
    return sum(f.numel() * f.element_size() for pair in factors.values() for f in pair) / MB


def in_fresh_process(
    problem: str, flavour: str, library: str, tiny: bool, device: str, threads: int
) -> First:
    """Run `first_call` in a process of its own, and again in one for the memory."""
    words = [problem, flavour, library, device, str(int(tiny)), str(threads)]
    timed, mapped = _run(words, {}), _run(words, MAPPED)
    return replace(mapped, seconds=timed.seconds)


def _run(words: list[str], more: dict[str, str]) -> First:
    root, above = Path(__file__).parents[2], Path(__file__).parents[1]
    paths = [str(above), str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | more
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # With caches a compiled first call would be a later one.
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
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
