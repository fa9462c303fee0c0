"""`python -m benchmarks.limits`, in tests/: what arithmetic and memory allow.

For each problem and one drawn label (`mc`), all over the gradient's:

- limit: multiply-adds of forward, backward to the taps without gradients of weights, and one
  triangle of each factor, of a convolution's input from its patches; of a step the gradient's
  own way back, too.
- counted: multiply-adds of fxkfac's call without kernels of its own, which take what the limit has.
  They are fewer than the limit where products of a moved image take the place of patches, and more
  where a triangle is taken with some of the other.
- touched: seconds of writing once to as much fresh memory as the factors take. No library that
  returns them can be without it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fxkfac
from benchmarks.measure import gradient
from benchmarks.problems import PROBLEMS, Problem
from fxkfac.measure import interleaved

aten = torch.ops.aten
REPEATS, BUDGET = 9, 10


@dataclass(frozen=True)
class Work:
    """Multiply-adds over the gradient's; see the module."""

    limit: float
    counted: float

    def __str__(self) -> str:
        return f"{self.limit:.2f} | {self.counted:.2f}"


@dataclass(frozen=True)
class Limits:
    """Of a problem; see the module."""

    mc: Work
    step: Work
    touched: float
    factors_mb: float


def limits(problem: Problem) -> Limits:
    """Count, and time the touching of memory beside the gradient."""
    data = problem.batches[0]
    program = fxkfac.trace(problem.model, data[0])

    def call() -> fxkfac.Factors:
        return fxkfac.kfac(program, problem.loss, data, fisher="mc")

    one = Problem(problem.model, problem.loss, [data], problem.joint)
    whole, report = multiply_adds(gradient(one)), call().report()
    weights = sums = 0
    for part, has_bias in ((p, len(row.params) > 1) for row in report for p in row.parts):
        assert part.rows is not None
        is_dense = len(part.A) > 1  # else counts of one-hot rows
        d_in, d_out = part.A[-1] * is_dense, part.B[-1]
        weights += part.rows * (d_in - has_bias) * d_out
        sums += part.rows * (d_in**2 + d_out**2) // 2
    held = report.total.memory
    touch = interleaved(gradient(one), {"touch": lambda: _touch(held)}, REPEATS, BUDGET)["touch"]
    mc = Work((whole - weights + sums) / whole, multiply_adds(call) / whole)
    # A step has the gradient's way back, too; torch's counter fails at leaves that enter a graph.
    back = (whole - multiply_adds(partial(problem.model, data[0]))) / whole
    return Limits(mc, Work(mc.limit + back, mc.counted + back), touch.median, held / 2**20)


def multiply_adds(call: Callable[[], Any]) -> int:
    """Of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        call()  # a program traces anew: the counter hooks all modules
        counter.flop_counts.clear()
        call()
    return counter.get_total_flops() // 2


def _of_sum(_: Any, a: Any, b: Any, **options: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# What torch's counter leaves out: products that are added in place.
IN_PLACE: dict[Any, Any] = {aten.addmm_: _of_sum, aten.baddbmm_: _of_sum}


def _touch(size: int) -> None:
    torch.empty(size, dtype=torch.uint8).zero_()


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser("benchmarks.limits", description=__doc__)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS))
    torch.set_num_threads(2)
    print("| problem | limit | counted | step: limit | counted | touched | factors |")
    print("|" + " --- |" * 7)
    for name in parser.parse_args().problems:
        found = limits(PROBLEMS[name].make(tiny=False))
        numbers = f"{found.mc} | {found.step} | {found.touched:.2f}"
        print(f"| {PROBLEMS[name].title} | {numbers} | {found.factors_mb:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
