"""`fxkfac bench`: what factors cost on the first batch, in gradients of the same loss."""

from __future__ import annotations

import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator

from fxkfac.cli.output import Result, note
from fxkfac.cli.target import Target, read_target, require_data
from fxkfac.cli.tracing import program_of
from fxkfac.curvature.kfac import kfac
from fxkfac.curvature.step import step
from fxkfac.errors import FxkfacError, OptionError
from fxkfac.functional import prediction_of
from fxkfac.graph.program import Program
from fxkfac.graph.table import columns
from fxkfac.likelihoods.losses import loss_value
from fxkfac.measure import Peak, Ratio, interleaved, later_peak, seconds_of, warning

FISHERS = ("mc", "empirical", "type-2")
GRADIENT = "loss, gradient"
STEP = "loss, gradient, mc"
HEADER = ("call", "seconds", "in gradients", "quartiles", "peak memory", "in gradients")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One call.

    Attributes:
        call: A flavour, whose factors it computes; or what it computes beside factors.
        seconds: Median.
        time: Over the gradient's; `None` for the gradient.
        peak_mb: The most memory above what is held before; `None` where none can tell.
    """

    call: str
    seconds: float
    time: Ratio | None
    peak_mb: float | None


def bench(asked: Namespace) -> Result:
    """Time and memory of loss and gradient, of factors, and of all in one."""
    if asked.repeats < 1 or not asked.budget >= 0:
        raise OptionError(
            f"--repeats {asked.repeats} --budget {asked.budget:g}: expected at least one repeat, "
            "and a number of seconds that is not negative."
        )
    target = read_target(asked.target)
    require_data(target, asked.command)
    start = time.perf_counter()
    program = program_of(asked, target)
    tracing = time.perf_counter() - start
    rows, refused = _measured(asked, program, target)
    about = _about(program, target, tracing)
    data = {**about, "rows": [_plain(row, rows[0]) for row in rows], "refused": refused}
    return Result(data, _text(about, rows, refused))


def _measured(
    asked: Namespace, program: Program, target: Target
) -> tuple[list[Row], dict[str, str]]:
    """The gradient and then all calls, and why others are refused."""
    with gradient_of(program, target) as gradient:
        calls, refused = _calls(asked, program, target)
        note(f"bench: timing {'; '.join(calls) or 'nothing'}")
        ratios = interleaved(gradient, calls, asked.repeats, asked.budget)
        befores = [ratio.gradient_seconds for ratio in ratios.values()]
        seconds = statistics.median(befores) if befores else seconds_of(gradient)
        note("bench: memory")
        device = program.like.device.type
        every = {GRADIENT: gradient, **calls}
        peaks = {name: later_peak(call, Peak(device)) for name, call in every.items()}
    rows = [Row(name, ratio.seconds, ratio, peaks[name]) for name, ratio in ratios.items()]
    return [Row(GRADIENT, seconds, None, peaks[GRADIENT]), *rows], refused


@contextmanager
def gradient_of(program: Program, target: Target) -> Iterator[Call]:
    """`torch.autograd.grad` of the loss on the first batch, while the model holds other tensors.

    So nothing of the user's is changed, and a call costs what it costs without fxkfac.
    """
    inputs, targets = target.first
    state = program.state()
    leaves = {n: state[n].detach().requires_grad_() for n in program.asked.selected}
    with program.model.holding({**state, **leaves}) as model:

        def call() -> Any:
            value = loss_value(target.loss, prediction_of(model(inputs)), targets)
            return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)

        yield call


def _calls(
    asked: Namespace, program: Program, target: Target
) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls that have run once, and why others are refused."""
    first = program, target.loss, target.first
    generator = Generator().manual_seed(asked.seed)
    calls: dict[str, Call] = {
        fisher: partial(kfac, *first, fisher=fisher, generator=generator)
        for fisher in asked.fisher or FISHERS
    }
    calls[STEP] = partial(step, *first, generator=generator)
    refused = {}
    for name, call in calls.items():
        try:
            call()
        except FxkfacError as error:
            refused[name] = str(error)
    return {name: call for name, call in calls.items() if name not in refused}, refused


def _about(program: Program, target: Target, tracing: float) -> dict[str, Any]:
    """What the times are of."""
    signature, cuda = program.signature, program.like.device.type == "cuda"
    return {
        "n": signature.batch_size(signature.tensors(target.inputs)),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tracing_seconds": tracing,
    }


def _plain(row: Row, gradient: Row) -> dict[str, Any]:
    return {**asdict(row), "memory": _memory(row, gradient)}


def _memory(row: Row, gradient: Row) -> float | None:
    """Over the gradient's."""
    if row.peak_mb is None or not gradient.peak_mb:
        return None
    return row.peak_mb / gradient.peak_mb


def _text(about: dict[str, Any], rows: list[Row], refused: dict[str, str]) -> str:
    busy = [row.time.elsewhere for row in rows if row.time]
    said = warning(busy[0]) if busy else None
    lines = [
        f"{about['n']} data, {about['device']}, {about['threads']} threads, torch "
        f"{about['torch']}; tracing took {about['tracing_seconds']:.1f} s",
        *columns([HEADER, *(_cells(row, rows[0]) for row in rows)]),
        *(f"{name} is refused: {reason}" for name, reason in refused.items()),
    ]
    return "\n".join([*lines, said] if said else lines)


def _cells(row: Row, gradient: Row) -> tuple[str, ...]:
    t, memory = row.time, _memory(row, gradient)
    return (
        row.call,
        f"{row.seconds:.3g}",
        f"{t.median:.2f}" if t else "1",
        f"{t.lower:.2f} to {t.upper:.2f}" if t else "",
        "–" if row.peak_mb is None else f"{row.peak_mb:.1f} MB",
        "–" if memory is None else f"{memory:.2f}",
    )
