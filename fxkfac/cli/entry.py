"""The words of a command line -> its output and exit status: 0 good, 1 a failed check, 2 an error.

Results go to standard output, everything else to standard error, the user's own prints included.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module

from fxkfac.cli.output import Result, as_json, say
from fxkfac.cli.parser import Parser, make_parser
from fxkfac.errors import FxkfacError

GOOD, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status.

    Args:
        words: Those after `fxkfac`; default: of this process.
    """
    parser = make_parser()
    _complete(parser)
    try:
        asked = parser.parse_args(words)
    except SystemExit as end:  # help, or wrong use, which the parser has said
        return int(end.code or GOOD)
    try:
        with redirect_stdout(sys.stderr):
            commands = import_module("fxkfac.cli.commands")
            result: Result = commands.run(asked)
        print(_shown(as_json(result.data) if asked.json else result.text), flush=True)
    except BrokenPipeError:  # whoever reads has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    except KeyboardInterrupt:
        say("fxkfac: stopped by Ctrl-C.")
        return INTERRUPTED
    except Exception as error:
        if asked.debug:
            traceback.print_exc()
        say(f"fxkfac: error: {_message(error)}")
        return WRONG
    return result.status


def _shown(text: str) -> str:
    """As far as the terminal has the letters: what was found is not lost for want of one."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _message(error: Exception) -> str:
    if isinstance(error, FxkfacError):
        return str(error)
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}. --debug shows where."


def _complete(parser: Parser) -> None:
    """Answer a shell that asks for completions, and end."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
