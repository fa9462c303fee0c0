"""A target, and what was asked for -> its program."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fxkfac.cli.output import note
from fxkfac.cli.target import Target
from fxkfac.errors import OptionError
from fxkfac.graph.program import Program
from fxkfac.graph.trace import trace


def program_of(asked: Namespace, target: Target) -> Program:
    """The model traced as asked for, or the program that the target has traced."""
    options = {
        "unsupported": asked.unsupported,
        "structure": _structure(asked.structure),
        "batch_axis": asked.batch_axis,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not isinstance(target.model, Program):
        note(f"tracing {target.text}")
        return trace(target.model, target.inputs, **given)
    if given:
        raise OptionError(
            f"{target.text} returns a program, which is traced already, but there is "
            f"--{next(iter(given)).replace('_', '-')}; expected no options about tracing. Leave "
            "it out, or pass it to fxkfac.trace there."
        )
    return target.model


def _structure(pairs: list[str] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise OptionError(
            f"--structure {wrong[0]}: expected PATTERN=KIND, such as 'conv*=diagonal'."
        )
    kinds: dict[str, str] = {}
    for name, _, kind in (pair.rpartition("=") for pair in pairs):
        kinds.pop(name, None)  # a later one overrides all earlier ones, so it comes last
        kinds[name] = kind
    return kinds
