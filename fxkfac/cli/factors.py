"""`fxkfac factors`: a program, a loss and data -> factors in a file.

Whatever stops the pass over the data, what was added until then is kept, to go on from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fxkfac.cli.interrupt import uninterrupted
from fxkfac.cli.output import Result, require_folder, say
from fxkfac.cli.progress import Shown
from fxkfac.cli.target import Target, read_target, require_data
from fxkfac.cli.tracing import program_of
from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.factors import Factors
from fxkfac.errors import DataError, FxkfacError, OptionError
from fxkfac.graph.program import Program
from fxkfac.persistence import resume, save

HOW = ("fisher", "sharing", "mc_samples")


def factors(asked: Namespace) -> Result:
    """Factors over all of the data, in a file."""
    require_folder(asked.output)
    require_one_source(asked, "resume")
    target = read_target(asked.target)
    require_data(target, asked.command)
    program = program_of(asked, target)
    if asked.resume is None:
        accumulation = new_accumulation(asked, program, target)
    else:
        accumulation = resume(asked.resume, program, target.loss)
    had = accumulation.batches
    try:
        add_all(accumulation, Shown(target.data, "factors"))
    except BaseException:
        if accumulation.batches > had:
            with uninterrupted():  # many press Ctrl-C twice
                _keep(accumulation, asked)
        raise
    computed = accumulation.factors()
    save(computed, asked.output)
    return _written(computed, accumulation.batches, asked.output)


def new_accumulation(asked: Namespace, program: Program, target: Target) -> Accumulation:
    """What sums the factors that are asked for."""
    given = {name: getattr(asked, name) for name in HOW if getattr(asked, name) is not None}
    generator = torch.Generator().manual_seed(asked.seed)
    return Accumulation(program, target.loss, generator=generator, **given)


def add_all(accumulation: Accumulation, data: Iterable[tuple[Any, Any]]) -> None:
    """Add all batches but those that are in it already.

    Raises:
        DataError: There are fewer of them.
    """
    had, met = accumulation.batches, 0
    for met, (inputs, targets) in enumerate(data, start=1):
        if met > had:
            with uninterrupted():
                accumulation.add(inputs, targets)
    if met < had:
        raise DataError(
            f"{had} batches are in the file, but the data have {met}; expected the same data. "
            "Name the target that it was begun with."
        )


def require_one_source(asked: Namespace, option: str) -> None:
    """Raise `OptionError` where the file says what is asked for, too."""
    file = getattr(asked, option)
    given = _how_given(asked)
    if file is not None and given:
        raise OptionError(
            f"{file!r} says how its factors are computed, but there is --{given[0]}; expected only "
            "one of the two. Leave it out."
        )


def _how_given(asked: Namespace) -> list[str]:
    """The options about factors that are there."""
    return [name.replace("_", "-") for name in HOW if getattr(asked, name) is not None]


def _keep(accumulation: Accumulation, asked: Namespace) -> None:
    """Save what is there, and say how to go on."""
    output = Path(asked.output)
    path = output.with_name(f"{output.stem}.partial{output.suffix}")
    try:
        save(accumulation, path)
    except FxkfacError as error:
        say(f"fxkfac: nothing is kept: {error}")
        return
    given = ", ".join(f"--{option}" for option in _how_given(asked))
    less = f" and without {given}" if given else ""
    say(
        f"fxkfac: {accumulation.n} data in {accumulation.batches} batches are kept in {path}: "
        f"with --resume {quote(str(path))}{less} the same command goes on."
    )


def _written(computed: Factors, batches: int, path: str) -> Result:
    settings = computed.settings
    shapes = {
        name: [{"A": list(p.A.shape), "B": list(p.B.shape)} for p in products]
        for name, products in computed.products.items()
    }
    data = {
        "written": path,
        "n": computed.n,
        "batches": batches,
        "count": computed.count,
        **{name: getattr(settings, name) for name in (*HOW, "loss")},
        "structures": dict(settings.structures),
        "products": shapes,
    }
    how = f"{settings.fisher}, {settings.sharing}"
    text = f"wrote {path}: {len(computed)} blocks of {computed.n} data in {batches} batches ({how})"
    return Result(data, text)
