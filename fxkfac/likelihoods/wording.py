"""Text that says which function or value something is, the same in every process.

Of a function it is the name and a digest of its code, with what it has closed over and its defaults
(globals that it reads are not looked into), of a large tensor a digest of its values, of a very
large one of some of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

FEW = 16  # entries of a tensor that are written out
MANY = 2**16  # of which all are looked at; they are, at every call
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
LIBRARIES = ("torch.", "builtins", "fxkfac.")  # whose classes are known by their names


def worded(value: Any, within: frozenset[int] = frozenset()) -> str:
    """The text of a value.

    Args:
        value: Anything.
        within: The `id`s of what it is a part of, which it may hold again.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if id(value) in within:
        return ".."
    say = partial(worded, within=within | {id(value)})
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{say(k)}: {say(v)}" for k, v in value.items())) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(say, value))}]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(say, value))) + "}"
    if isinstance(value, FunctionType | MethodType | partial | type):
        return _of_callable(value, say)
    if isinstance(value, nn.Module):
        return f"{say(type(value))}{say(value.state_dict())}"
    if type(value).__repr__ is object.__repr__:
        return f"{say(type(value))}({said(vars(value), say) if hasattr(value, '__dict__') else ''})"
    return ADDRESS.sub("", repr(value))


def said(named: Mapping[str, Any], say: Any = worded) -> str:
    """Names with their values, in order."""
    return ", ".join(f"{key}={say(value)}" for key, value in sorted(named.items()))


def _of_tensor(t: Tensor) -> str:
    if t.numel() <= FEW:
        return str(t.tolist())
    some = t.detach().flatten()[:: -(-t.numel() // MANY)]
    numbers = some.resolve_neg().resolve_conj().cpu().contiguous()
    digest = _digest([numbers.view(torch.uint8).numpy().tobytes()])
    return f"tensor({list(t.shape)}, {str(t.dtype).removeprefix('torch.')}, {digest})"


def _of_callable(value: Any, say: Any) -> str:
    if isinstance(value, partial):
        return f"partial({say(value.func)}, {say(value.args)}, {say(value.keywords)})"
    if isinstance(value, MethodType):
        return f"{say(value.__func__)} of {say(value.__self__)}"
    name = value.__name__
    if str(value.__module__).startswith(LIBRARIES):
        return name
    if isinstance(value, type):
        functions = [f for _, f in sorted(vars(value).items()) if isinstance(f, FunctionType)]
        bases = [b for b in value.__bases__ if not str(b.__module__).startswith(LIBRARIES)]
        return f"{name}#{_digest(say(part).encode() for part in [*bases, *functions])}"
    closed = [_contents(cell) for cell in value.__closure__ or ()]
    parts = [*_of_code(value.__code__), say([closed, value.__defaults__, value.__kwdefaults__])]
    return f"{name}#{_digest(part.encode() for part in parts)}"


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that is defined later
        return None


def _of_code(code: CodeType) -> Iterable[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames[: code.co_argcount]))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:
            yield worded(constant)


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:12]
