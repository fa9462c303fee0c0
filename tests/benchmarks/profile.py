"""`python -m benchmarks.profile PROBLEM FLAVOUR`, in tests/: where the time of fxkfac goes.

Prints the mean of a few calls in the steady state: the time without a profiler; by `torch.profiler`
the shares of matrix products (attention among them), of convolutions, of sums by kernels of our
own, of all other torch operations and of what is outside of them, which is Python; and the
operations with the most time of their own.
`--backend inductor` takes the compiled call, where there is one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.interface import Prepared, Refused
from benchmarks.own import INDUCTOR
from benchmarks.peers import PEERS
from benchmarks.problems import ALL, PROBLEMS
from fxkfac.linalg import Gram
from fxkfac.measure import Elsewhere, seconds_of, warning

CALL, SUMS = "one call of fxkfac", "sums by kernels"
WARM_UPS, TIMED = 2, 3
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv", "addbmm", "linear")


class Operation(NamedTuple):
    """Milliseconds of its own and how often it runs, per call of fxkfac."""

    name: str
    milliseconds: float
    calls: int


def operations(prepared: Prepared) -> list[Operation]:
    """The longest first; `CALL` itself has what is outside of torch operations."""
    with _sums_recorded(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(TIMED):
            with record_function(CALL):
                prepared.call()
    found: list[Any] = profiler.key_averages()
    rows = [Operation(e.key, e.self_cpu_time_total / 1e3 / TIMED, e.count // TIMED) for e in found]
    return sorted(rows, key=lambda row: -row.milliseconds)


@contextmanager
def _sums_recorded() -> Iterator[None]:
    """Kernels are no operations, and show by a name of their own."""
    plain = Gram.add

    def recorded(*args: Any) -> Tensor | None:
        with record_function(SUMS):
            return plain(*args)

    Gram.add = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Gram.add = plain  # type: ignore[method-assign]


def shares(rows: list[Operation]) -> dict[str, float]:
    """Of the profiled time, by kind."""
    total = sum(row.milliseconds for row in rows)
    result = dict.fromkeys(("matrix products", "convolutions", SUMS, "other torch", "outside"), 0.0)
    for row in rows:
        result[_kind(row.name)] += row.milliseconds / total
    return result


def _kind(name: str) -> str:
    if name == CALL:
        return "outside"
    if name == SUMS:
        return SUMS
    short = name.removeprefix("aten::").strip("_")
    if short in PRODUCTS or short.startswith("scaled_dot_product"):
        return "matrix products"
    convolves = name.startswith("aten::") and "conv" in short
    return "convolutions" if convolves else "other torch"


def report(prepared: Prepared, top: int) -> str:
    """What is printed."""
    for _ in range(WARM_UPS):
        prepared.call()
    elsewhere = Elsewhere()
    plain = 1e3 * seconds_of(prepared.call, TIMED)
    rows = operations(prepared)
    profiled = sum(row.milliseconds for row in rows)
    lines = [f"{plain:.1f} ms a call, {profiled:.1f} ms under the profiler", ""]
    lines += [f"{share:6.1%}  {kind}" for kind, share in shares(rows).items()]
    lines += ["", "    ms  share   calls  operation"]
    for row in [row for row in rows if row.name != CALL][:top]:
        share = row.milliseconds / profiled
        lines.append(f"{row.milliseconds:6.1f}  {share:5.1%}  {row.calls:6}  {row.name}")
    said = warning(elsewhere.cores())
    return "\n".join([*lines, "", said] if said else lines)


def main(words: list[str] | None = None) -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser("benchmarks.profile", description=__doc__)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("flavour", choices=ALL)
    parser.add_argument("--backend", choices=("eager", INDUCTOR), default="eager")
    parser.add_argument("--tiny", action="store_true", help="the problem at its tiny size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=12, help="number of operations")
    a = parser.parse_args(words)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says that it starts and stops
    torch.set_num_threads(a.threads)
    peer = PEERS[INDUCTOR if a.backend == INDUCTOR else "fxkfac"]
    try:
        prepared = peer.prepare(PROBLEMS[a.problem].make(a.tiny), a.flavour)
    except Refused as reason:
        parser.exit(1, f"{reason}\n")
    print(f"{PROBLEMS[a.problem].title}; {a.flavour}; {a.threads} threads")
    print(report(prepared, a.top))


if __name__ == "__main__":
    main()
