"""What was asked for -> result: one function for each command."""

from __future__ import annotations

import warnings
from argparse import Namespace
from dataclasses import asdict

import torch

from fxkfac.cli.bench import bench
from fxkfac.cli.factors import factors
from fxkfac.cli.output import Result, require_folder
from fxkfac.cli.report import report
from fxkfac.cli.target import read_target, require_data
from fxkfac.cli.tracing import program_of
from fxkfac.curvature.check import check as compare
from fxkfac.errors import FileError, TapMismatch
from fxkfac.graph.table import HEADER, use_row
from fxkfac.isolation import own_randomness


def run(asked: Namespace) -> Result:
    """The command that was named, with randomness of its own."""
    with own_randomness():
        torch.manual_seed(asked.seed)  # of accelerators, too, even where none is in use yet
        return COMMANDS[asked.command](asked)


def trace(asked: Namespace) -> Result:
    """The program and its coverage."""
    program = program_of(asked, read_target(asked.target))
    coverage, tapped = program.coverage(), program.tapped
    keys = [column.replace(" ", "_") for column in HEADER]
    data = {
        "front_end": tapped.captured.front_end,
        "any_batch_size": tapped.dynamic,
        "uses": [dict(zip(keys, use_row(use), strict=True)) for use in program.uses],
        "coverage": [asdict(row) for row in coverage],
        "shares": coverage.shares(),
        "unsupported": [str(u) for u in tapped.unsupported],
        "refusals": dict(tapped.refusals),
    }
    return Result(data, f"{program}\n\n{coverage}")


def draw(asked: Namespace) -> Result:
    """The picture."""
    require_folder(asked.output)
    program = program_of(asked, read_target(asked.target))
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        written = program.draw(asked.output, fold=asked.fold)
    if written != asked.output:  # the program dot is missing, or fails
        raise FileError(str(met[-1].message))
    return Result({"written": written}, f"wrote {written}")


def check(asked: Namespace) -> Result:
    """Gradients from the taps against autograd's, on the first batch."""
    target = read_target(asked.target)
    require_data(target, asked.command)
    program = program_of(asked, target)
    try:
        errors = compare(program, target.loss, target.first)
    except TapMismatch as mismatch:
        return Result({"passed": False, "message": str(mismatch)}, str(mismatch), status=1)
    worst = max(errors, key=lambda name: errors[name], default=None)
    text = f"the gradients of {len(errors)} parameters, put together from the taps, are autograd's"
    if worst is not None:
        text += f": relative error {errors[worst]:.0e} at most ({worst})"
    return Result({"passed": True, "errors": errors}, text)


COMMANDS = {
    "trace": trace,
    "draw": draw,
    "check": check,
    "factors": factors,
    "report": report,
    "bench": bench,
}
