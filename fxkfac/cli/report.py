"""`fxkfac report`: factors, from a file or computed -> what their blocks are, in numbers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Generator

from fxkfac.cli.factors import add_all, new_accumulation, require_one_source
from fxkfac.cli.output import Result
from fxkfac.cli.progress import Shown
from fxkfac.cli.target import Target, read_target, require_data
from fxkfac.cli.tracing import program_of
from fxkfac.curvature.corrections.corrected import Corrected
from fxkfac.curvature.corrections.ekfac import ekfac
from fxkfac.curvature.corrections.kfoc import kfoc
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.running import RunningAverage
from fxkfac.curvature.settings import Settings
from fxkfac.graph.program import Program
from fxkfac.persistence import load

CORRECTIONS: dict[str, Callable[..., Corrected]] = {"ekfac": ekfac, "kfoc": kfoc}


def report(asked: Namespace) -> Result:
    """A row for every block."""
    require_one_source(asked, "factors")
    target = read_target(asked.target)
    require_data(target, asked.command)
    program = program_of(asked, target)
    data = Shown(target.data, "factors")
    factors = _factors(asked, program, target, data)
    curvature = _corrected(asked, program, target, data, factors) if asked.correction else factors
    found, settings = curvature.report(), _settings(factors)
    how = {"fisher": settings.fisher, "sharing": settings.sharing, "correction": asked.correction}
    text = ", ".join(word for word in how.values() if word)
    return Result({**how, **found.as_dict()}, f"{text}: {found}")


def _settings(factors: Factors | RunningAverage) -> Settings:
    """Of the file's factors, which may be averages."""
    held = factors.averages if isinstance(factors, RunningAverage) else factors
    assert held is not None  # one without any is not saved
    return held.settings


def _factors(asked: Namespace, program: Program, target: Target, data: Shown) -> Any:
    if asked.factors is not None:
        return load(asked.factors, program, target.loss)
    accumulation = new_accumulation(asked, program, target)
    add_all(accumulation, data)
    return accumulation.factors()


def _corrected(
    asked: Namespace, program: Program, target: Target, data: Shown, factors: Factors
) -> Corrected:
    """By passes over the data that draw what the pass for the factors has drawn."""
    correct = CORRECTIONS[asked.correction]
    once = hasattr(target.data, "__next__")  # which they refuse, where they need it again
    again = target.data if once else replace(data, what=asked.correction)
    generator = Generator().manual_seed(asked.seed)
    return correct(program, target.loss, again, factors, generator=generator)
