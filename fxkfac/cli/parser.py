"""The words of a command line -> what was asked for.

Nothing heavy is imported for that, so that help and completion are quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

TARGET = """\
TARGET names a Python function without arguments: package.module:function, or
path/to/file.py:function. It returns (model, inputs) or (model, loss, data), with data one
(inputs, targets) pair or an iterable of them, as a DataLoader is. In the model's place there may be
a program of fxkfac.trace. Without :function it is the one called `target`.
"""
EXAMPLES = {
    "": """\
examples:
  fxkfac trace examples/target.py                     where the model is tapped
  fxkfac draw examples/target.py -o model.svg         the same as a picture
  fxkfac check examples/target.py                     gradients from the taps against autograd
  fxkfac factors examples/target.py --fisher mc -o factors.safetensors
  fxkfac report examples/target.py --factors factors.safetensors
  fxkfac bench examples/target.py                     time and memory, in gradients

exit status: 0 good, 1 the check failed, 2 wrong use or an error, 130 stopped by Ctrl-C
""",
    "trace": """\
examples:
  fxkfac trace package.module:function
  fxkfac trace examples/target.py --structure 'conv*=diagonal' --json
""",
    "draw": """\
examples:
  fxkfac draw examples/target.py -o model.svg
""",
    "check": """\
examples:
  fxkfac check examples/target.py && echo 'no use was missed'
""",
    "factors": """\
examples:
  fxkfac factors examples/target.py --fisher mc -o factors.safetensors
  fxkfac factors examples/target.py --resume factors.partial.safetensors -o factors.safetensors
""",
    "report": """\
examples:
  fxkfac report examples/target.py --fisher empirical
  fxkfac report examples/target.py --factors factors.safetensors --correction ekfac --json
""",
    "bench": """\
examples:
  fxkfac bench examples/target.py
  fxkfac bench examples/target.py --fisher mc --fisher type-2 --repeats 15
""",
}


@dataclass(frozen=True)
class Choices:
    """The names that a module has in a tuple; it is imported when they are asked for."""

    module: str
    name: str

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(import_module(self.module), self.name))

    def __contains__(self, word: object) -> bool:
        return word in tuple(self)


FISHERS = Choices("fxkfac.likelihoods.backpropagation", "FISHERS")
SHARINGS = Choices("fxkfac.curvature.sharing", "SHARINGS")
POLICIES = Choices("fxkfac.graph.structure", "POLICIES")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where help is."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"fxkfac: error: {message}; see `{self.prog} --help`.\n")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "fxkfac",
        description="The curvature of a PyTorch model, from the command line.\n\n" + TARGET,
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    trace = _command(commands, "trace", "print the program: every use, and who is covered")
    _about_trace(trace)
    draw = _command(commands, "draw", "draw the program")
    _about_trace(draw)
    _output(draw, "the picture; its ending says the format, as of fxkfac.Program.draw")
    draw.add_argument("--fold", action="store_true", help="draw repeated layers only once")
    check = _command(commands, "check", "compare the gradients from the taps with autograd's")
    _about_trace(check)
    factors = _command(commands, "factors", "compute factors over the data, and save them")
    _about_trace(factors)
    _about_factors(factors)
    _output(factors, "where they go, as by fxkfac.save; a safetensors file")
    factors.add_argument("--resume", metavar="FILE", help="go on from what Ctrl-C has left")
    report = _command(commands, "report", "print what the factors are like, layer by layer")
    _about_trace(report)
    _about_factors(report)
    report.add_argument("--factors", metavar="FILE", help="those in a file, not computed anew")
    report.add_argument(
        "--correction", choices=("ekfac", "kfoc"), help="correct them by passes over the data"
    )
    bench = _command(commands, "bench", "time factors on the first batch, in gradients")
    _about_trace(bench)
    _about_bench(bench)
    return parser


def _command(commands: argparse._SubParsersAction[Parser], name: str, about: str) -> Parser:
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.\n\n{TARGET}",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", help="a function that returns the model")
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of the function's, the data's and the labels' draws; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="plain data on standard output")
    parser.add_argument("--debug", action="store_true", help="the traceback of an error")
    return parser


def _seed(text: str) -> int:
    """A number that a generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 0 to 2**63 - 1")
    return int(text)


def _about_trace(parser: Parser) -> None:
    group = parser.add_argument_group("tracing, as of fxkfac.trace")
    group.add_argument(
        "--unsupported",
        metavar="POLICY",
        choices=POLICIES,
        help="for parameters without a rule: %(choices)s; default: error",
    )
    group.add_argument(
        "--structure",
        metavar="PATTERN=KIND",
        action="append",
        help="what the blocks of some parameters are made of; may be repeated",
    )
    group.add_argument("--batch-axis", metavar="AXIS", type=int, help="of the inputs; default: 0")


def _about_factors(parser: Parser) -> None:
    group = parser.add_argument_group("factors, as of fxkfac.kfac")
    group.add_argument(
        "--fisher", metavar="NAME", choices=FISHERS, help="%(choices)s; default: type-2"
    )
    group.add_argument(
        "--sharing", metavar="NAME", choices=SHARINGS, help="%(choices)s; default: expand"
    )
    group.add_argument(
        "--mc-samples", metavar="M", type=int, help="draws for each datum; default: 1"
    )


def _about_bench(parser: Parser) -> None:
    parser.add_argument(
        "--fisher",
        metavar="NAME",
        choices=FISHERS,
        action="append",
        help="may be repeated: %(choices)s; default: mc, empirical and type-2",
    )
    parser.add_argument("--repeats", type=int, default=9, help="at most; default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=30, help="seconds; then few repeats; default: %(default)s"
    )


def _output(parser: Parser, about: str) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=about)
