"""A function -> the modules, values and functions that it reaches beside its arguments."""

from __future__ import annotations

import dis
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import einops
import torch
from torch import nn

from fxkfac.isolation import held_by

FOREIGN = tuple(str(Path(file).parent) for file in (torch.__file__, einops.__file__, __file__))


def is_foreign(file: str) -> bool:
    """Whether a file is torch's or fxkfac's."""
    return file.startswith(FOREIGN) or file.startswith(("torch/", "<"))


@dataclass(frozen=True)
class Reached:
    """What a model is made of.

    Attributes:
        modules: Those that it may call; the model itself, where it is one.
        functions: The user's own, and what wraps them.
        values: Whatever else they name, in a closure or as a global, or are bound to.
    """

    modules: list[nn.Module] = field(default_factory=list)
    functions: list[FunctionType] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def all_modules(self) -> list[nn.Module]:
        """The modules and those within them, each once."""
        found: dict[nn.Module, None] = {}
        stack = [*self.modules]
        while stack:
            module = stack.pop()
            # It may hold one that holds it; a scripted one has no Python, and is refused later.
            if module not in found and not isinstance(module, torch.jit.ScriptModule):
                found[module] = None
                stack += [m for m in module._modules.values() if m is not None]
        return list(found)


def held(model: Callable[..., Any]) -> AbstractContextManager[None]:
    """Afterwards all that a model reaches holds what it held, as by `held_by`."""
    reached = reached_from(model)
    return held_by(reached.all_modules(), reached.values)


def reached_from(model: Callable[..., Any]) -> Reached:
    """Follow closures, globals, bound objects and partial functions; modules are not entered."""
    found, seen = Reached(), set[int]()
    waiting: list[Any] = [model]
    while waiting:
        value: Any = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.modules.append(value)
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            waiting += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            found.functions.append(value)
            waiting += named_by(value)
        else:
            found.values.append(value)
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict) and not isinstance(value, type):
                waiting += [v for v in attributes.values() if isinstance(v, nn.Module)]
    return found


def named_by(function: FunctionType) -> list[Any]:
    """The values that a function names now; of torch's own, those of its closure alone."""
    cells = [c.cell_contents for c in function.__closure__ or () if not _is_empty(c)]
    if is_foreign(function.__code__.co_filename):
        return cells
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names, held = _globals(function.__code__), function.__globals__
    return [*cells, *defaults, *(held[name] for name in names if name in held)]


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


@cache
def _globals(code: CodeType) -> tuple[str, ...]:
    """The globals that a function reads, also in functions within it."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [n for c in code.co_consts if isinstance(c, CodeType) for n in _globals(c)]
    return tuple(dict.fromkeys([*own, *inner]))
