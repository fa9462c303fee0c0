"""One run of the model, watched: which attributes of its modules it reads.

What was not read while a graph was traced cannot be in it. What the run itself changes, such as a
counter or an activation that is kept, is another one at every call, and does not count.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module

from fxkfac.errors import CaptureError
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.front_ends.constants import Same, constant_key
from fxkfac.graph.front_ends.memos import OWN, Held, require_no_memos
from fxkfac.graph.quiet import others_states

LONG, LARGE = 1000, 2**16  # entries of a list, bytes of an array

Names = frozenset[str] | None  # of the attributes of one module; `None` for all


def attribute_key(value: Any) -> Any:
    """As `constant_key`; but long lists and large arrays, which take long, by identity."""
    if isinstance(value, Tensor):  # by identity as well; and a sparse one has no `nbytes`
        return Same(value)
    is_long = isinstance(value, list | tuple | dict | set) and len(value) > LONG
    return Same(value) if is_long or getattr(value, "nbytes", 0) > LARGE else constant_key(value)


@dataclass(frozen=True)
class Reads:
    """What one run does with what the model is made of.

    Attributes:
        names: The attributes of each module that it reads and leaves as they are.
        moving: Positions of the values of a function that it changes inside.
    """

    names: tuple[Names, ...] = ()
    moving: frozenset[int] = frozenset()


def reads_of(
    model: FlatModel, tensors: list[Tensor], modules: Sequence[nn.Module], values: Sequence[Any]
) -> Reads:
    """Run the model once, and watch.

    Raises:
        CaptureError: The model draws random numbers that are not torch's, or keeps what it has
            computed of its parameters.
    """
    everything = Reads((None,) * len(modules))
    if any(_is_compiled(m) for m in modules):
        return everything
    before, drawn = [_attributes(m) for m in modules], others_states()
    held, as_they_were = [*map(attribute_key, values)], Held(modules)
    try:
        with _recording(modules) as reads:
            model.predict(model.state(), tensors)
    except Exception:  # the model's own, of which tracing speaks
        return everything
    _require_drawn_by_torch(drawn)
    after = [_attributes(m) for m in modules]
    moving = (k for k, v in enumerate(values) if attribute_key(v) != held[k])
    if as_they_were.tensors_are_new():
        as_they_were.put_back()
        require_no_memos(model, tensors, modules)
    return Reads(tuple(map(_kept, before, after, reads)), frozenset(moving))


def _kept(before: dict[str, Any], after: dict[str, Any], reads: Names) -> Names:
    """Those of the attributes that were read which are the same before and after the run."""
    new = {name for name in {*before, *after} if _other(before, after, name)}
    return frozenset(after if reads is None else reads) - new if new else reads


def _other(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    return name not in before or name not in after or bool(before[name] != after[name])


def _attributes(m: nn.Module) -> dict[str, Any]:
    return {n: attribute_key(v) for n, v in m.__dict__.items() if n not in OWN}


def _is_compiled(m: nn.Module) -> bool:
    """Whether torch has compiled it, and would again for another class."""
    return m._compiled_call_impl is not None or "_orig_mod" in m._modules


@contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[list[Names]]:
    """Have every module note what is read of it, by a class of its own for as long."""
    reads: dict[int, set[str]] = {id(m): set() for m in modules}
    kinds = [type(m) for m in modules]
    recorders = {kind: _recorder(kind, reads) for kind in dict.fromkeys(kinds)}
    found: list[Names] = []
    try:
        for m, kind in zip(modules, kinds, strict=True):
            object.__setattr__(m, "__class__", recorders[kind] or kind)
        yield found
    finally:
        for m, kind in zip(modules, kinds, strict=True):
            object.__setattr__(m, "__class__", kind)
    for m, kind in zip(modules, kinds, strict=True):
        names = reads[id(m)]
        is_known = recorders[kind] is not None and "__dict__" not in names
        found.append(frozenset(names - OWN) if is_known else None)


def _recorder(kind: type[nn.Module], reads: dict[int, set[str]]) -> type | None:
    """The class of a module that notes what is read; `None` where a class hears of its own."""
    if type(kind) not in (type, ABCMeta) or hasattr(kind.__init_subclass__, "__func__"):
        return None
    get = kind.__getattribute__

    def noted(self: Any, name: str) -> Any:
        # A module looks into its own dict for every parameter.
        if name != "__dict__" or sys._getframe(1).f_code.co_filename != module.__file__:
            reads.get(id(self), set()).add(name)
        return get(self, name)

    body = {"__getattribute__": noted, "__module__": kind.__module__, "__doc__": kind.__doc__}
    make: Any = type(kind)
    recorder: type = make(kind.__name__, (kind,), body | {"__qualname__": kind.__qualname__})
    return recorder


def _require_drawn_by_torch(before: dict[str, Any]) -> None:
    """Raise `CaptureError` where another generator has moved."""
    now = others_states()
    moved = [n for n, state in before.items() if constant_key(now[n]) != constant_key(state)]
    if moved:
        raise CaptureError(
            f"the model draws from {' and '.join(moved)} while it runs; expected random numbers "
            "of torch alone, since a graph would hold the one draw of the trace for ever. Draw by "
            "torch.rand without reading the values in Python, or trace in a mode that draws none."
        )
