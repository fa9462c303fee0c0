"""What a command has found -> text, or JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxkfac.errors import FileError


@dataclass(frozen=True)
class Result:
    """What a command returns.

    Attributes:
        data: All of it, for `--json`: dicts, lists, strings, numbers.
        text: What is printed otherwise.
        status: The exit status.
    """

    data: Mapping[str, Any]
    text: str
    status: int = 0


def as_json(data: Any) -> str:
    """As JSON, which has no infinity and no NaN: these become "inf" and "nan"."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def say(line: str) -> None:
    """A line beside the results."""
    print(line, file=sys.stderr, flush=True)


def note(line: str) -> None:
    """The same for who sits and waits."""
    if sys.stderr.isatty():
        say(line)


def require_folder(path: str) -> None:
    """Raise `FileError` before the work, not after it, where a file cannot be written."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileError(f"cannot write {path!r}: there is no folder {str(folder)!r}. Make it.")
    if not os.access(folder, os.W_OK):
        raise FileError(
            f"cannot write {path!r}: you may not write to {str(folder)!r}. Name another folder."
        )
    if Path(path).is_dir():
        raise FileError(f"cannot write {path!r}: it is a folder. Name a file.")
