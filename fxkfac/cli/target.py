"""TARGET, as text -> the user's model, loss and data.

It names a function, `package.module:function` or `path/to/file.py:function`, that returns
`(model, inputs)` or `(model, loss, data)`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxkfac.curvature.data import batches
from fxkfac.errors import FxkfacError, TargetError
from fxkfac.graph.program import Program
from fxkfac.isolation import own_randomness
from fxkfac.reached import is_foreign

DEFAULT = "target"  # the function of a TARGET that names none
EXPECTED = "(model, inputs) or (model, loss, data)"


@dataclass(frozen=True)
class Target:
    """What the user's function returned.

    Attributes:
        text: What was named.
        model: A module, or a program that was traced already.
        inputs: Example inputs.
        loss: The loss; `None` where only inputs came.
        data: One (inputs, targets) pair, or an iterable of them; `None` where only inputs came.
        first: The first (inputs, targets) pair of the data.
    """

    text: str
    model: nn.Module | Program
    inputs: Any
    loss: Any = None
    data: Any = None
    first: Any = None


def read_target(text: str) -> Target:
    """Import what is named, and call it.

    Raises:
        TargetError: It cannot be imported, is no function, fails, or returns something else.
    """
    where, name = _split(text)
    module = _file(where) if _is_path(where) else _module(where)
    found = _called(text, _function(module, where, name))
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else _a(found)
        raise TargetError(f"{text} returns {what}; expected {EXPECTED}.")
    _require_model(text, found[0])
    if len(found) == 2:
        return Target(text, *found)
    model, loss, data = found
    first, data = _first(data)
    return Target(text, model, first[0], loss, data, first)


def require_data(target: Target, command: str) -> None:
    """Raise `TargetError` where there are only inputs."""
    if target.data is None:
        raise TargetError(
            f"{target.text} returns (model, inputs), but `fxkfac {command}` needs a loss and data; "
            "expected (model, loss, data)."
        )


def _split(text: str) -> tuple[str, str]:
    """Where the function is, and its name; a colon may stand in a path, too."""
    where, colon, name = text.rpartition(":")
    return (where, name) if colon and name.isidentifier() else (text, DEFAULT)


def _is_path(where: str) -> bool:
    return where.endswith(".py") or os.sep in where


def _module(name: str) -> ModuleType:
    _make_importable(Path.cwd())  # as `python -m` does
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(
            f"{name!r} is neither a module nor a path that ends in .py; expected "
            "package.module:function or path/to/file.py:function."
        )
    return _imported(name, lambda: importlib.import_module(name))


def _file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise TargetError(f"there is no file {path!r}; expected path/to/file.py:function.")
    _make_importable(file.parent)  # as `python path/to/file.py` does
    # Not in the place of another module that has the file's name.
    held = sys.modules.get(file.stem)
    free = held is None or getattr(held, "__file__", None) == str(file)
    spec = importlib.util.spec_from_file_location(file.stem if free else f"_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path!r} is no Python file; expected path/to/file.py:function.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    loader = spec.loader

    def run() -> ModuleType:
        loader.exec_module(module)
        return module

    return _imported(path, run)


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _imported(name: str, run: Callable[[], ModuleType]) -> ModuleType:
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            remedy = "Run in the folder that it is in, or name the file: path/to/file.py:function."
        else:
            remedy = "Install it in the environment that fxkfac runs in."
        raise TargetError(f"{name!r} cannot be imported: {error}. {remedy}") from error
    except (FxkfacError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a script may end the process
        raise TargetError(f"{name!r} cannot be imported: {_said(error)}") from error


def _function(module: ModuleType, where: str, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {where}:{near[0]}?" if near else "Name it as MODULE:FUNCTION."
    what = "no" if found is None else f"{_a(found)}, but no function,"
    raise TargetError(f"{where!r} has {what} {name!r}; expected a function. {hint}")


def _called(text: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except FxkfacError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{text} fails: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An error of the user's code in one line, with its place."""
    said = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    places = [(f.filename, f.lineno) for f in frames if not f.filename.startswith("<")]
    if isinstance(error, SyntaxError) and error.filename:
        said, places = error.msg, [(error.filename, error.lineno)]
    places = [place for place in places if not is_foreign(place[0])]
    own = [place for place in places if "site-packages" not in place[0]] or places
    where = f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {said}{where}. --debug shows more."


def _require_model(text: str, model: Any) -> None:
    if isinstance(model, nn.Module | Program):
        return
    remedy = (
        "For a function, return the program fxkfac.trace(model, inputs, params) in its place."
        if callable(model)
        else f"Return {EXPECTED}."
    )
    raise TargetError(f"{text} returns {_a(model)} as its model; expected an nn.Module. {remedy}")


def _first(data: Any) -> tuple[Any, Any]:
    """The first batch, and the data with that batch still in them."""
    if hasattr(data, "__next__"):
        iterator = batches(data)
        first = next(iterator)
        return first, chain([first], iterator)
    with own_randomness():  # a loader that shuffles does so again, in the same way
        return next(batches(data)), data


def _a(found: Any) -> str:
    name = type(found).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
