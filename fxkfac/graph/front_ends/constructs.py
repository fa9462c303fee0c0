"""A model that no front end captures -> what in it no graph can hold, and on which line.

Front ends speak of what they met in their own depths. So the model itself is run once more, and
watched: a profile function sees the calls of what leaves the graph (control flow, custom
`autograd.Function`s), a torch-function mode the values that Python reads out of a tensor.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.utils import rnn as packing
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from fxkfac.errors import CaptureError, FxkfacError
from fxkfac.functional import FunctionalModel
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.source import caller, is_users
from fxkfac.graph.uses.ir import Source

SELECT = "choose by torch.where between both branches, or trace the branch that you mean"
UNROLL = "write it as a Python loop, whose steps are then uses of their own"
NUMBER = (
    "keep it a tensor (torch.where in the place of if), or pass it as an input that is no tensor"
)
DETACH = (
    "write its backward by detach, as y + (f(x) - y).detach(), or select by params= only what "
    "comes after it"
)
SAVED = "pass use_reentrant=False, which computes the same"
INPUTS = "trace on inputs with which the model runs"
PYTHON = "trace the Python module or function that it was made from"

# (module, function) -> (what the user calls it, what to do)
CALLS = {
    ("torch._higher_order_ops.cond", "cond"): ("torch.cond", SELECT),
    ("torch._higher_order_ops.while_loop", "while_loop"): ("torch.while_loop", UNROLL),
    ("torch._higher_order_ops.scan", "scan"): ("scan", UNROLL),
    ("torch._higher_order_ops.associative_scan", "associative_scan"): ("associative_scan", UNROLL),
    ("torch._higher_order_ops.map", "map"): ("map", UNROLL),
}
VALUES = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "__array__"}


TABLES = (nn.Embedding, nn.EmbeddingBag)
OPTIONS = {
    "max_norm": "which shortens rows of the table in place whenever it runs; expected a model that "
    "leaves its parameters alone. Set max_norm=None, and shorten the rows after each step",
    "scale_grad_by_freq": "whose backward divides by how often an index is in the batch; expected "
    "the loss's own gradient, of which there is curvature. Set scale_grad_by_freq=False",
}


@dataclass(frozen=True)
class Construct:
    """Something that a graph cannot hold.

    Attributes:
        name, source, remedy: What it is, where the user's code meets it, and what to do.
        of_gradients: Whether it is the gradients that a graph would get wrong, not the values.
    """

    name: str
    source: Source | None
    remedy: str
    of_gradients: bool = False

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        code = f"\n      {self.source.code}" if self.source and self.source.code else ""
        return f"{self.name}{at}{code}\n    {self.remedy[0].upper()}{self.remedy[1:]}."


def require_own_gradients(bound: FunctionalModel) -> None:
    """Refuse a selected table that writes into itself while it runs, or whose backward is no slope.

    Before the model runs: the table is the user's.

    Raises:
        CaptureError: For `max_norm` and `scale_grad_by_freq`.
    """
    if not isinstance(bound.model, nn.Module):
        return
    for path, module in bound.model.named_modules():
        name = f"{path}.weight".removeprefix(".")
        if not isinstance(module, TABLES) or bound.aliases.get(name, name) not in bound.selected:
            continue
        for option, remedy in OPTIONS.items():
            if getattr(module, option):
                raise CaptureError(
                    f"{name!r} is of an {type(module).__name__} with {option}="
                    f"{getattr(module, option)}, {remedy}, or select others by params=."
                )


def constructs_of(model: FlatModel, tensors: list[Tensor]) -> list[Construct]:
    """What one run of the model meets, in order; once for every line. Or why it does not run."""
    found = _scripted(model.bound.model) or _own_error(model, tensors)
    if found:
        return found
    with suppress(Exception), _watching(found), _Values(found):  # the model's own errors, too
        model.predict(model.state(), tensors)
    return list({(c.name, c.source): c for c in found}.values())


def _scripted(model: Any) -> list[Construct]:
    """Parts that TorchScript runs: they have no Python to trace, and no parameters to swap."""
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {"": model}
    kinds = torch.jit.ScriptModule | torch.jit.ScriptFunction
    scripted = {name: part for name, part in named.items() if isinstance(part, kinds)}
    outermost = {n: p for n, p in scripted.items() if not n or n.rpartition(".")[0] not in scripted}
    return [
        Construct(f"{name or 'the model'} is a {type(part).__name__} of torch.jit", None, PYTHON)
        for name, part in outermost.items()
    ]


def _own_error(model: FlatModel, tensors: list[Tensor]) -> list[Construct]:
    """The model's own error on these inputs."""
    try:
        model.predict(model.state(), tensors)
    except FxkfacError:
        return []
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [frame for frame in frames if is_users(frame.f_code.co_filename)]
        first = next(iter(str(error).splitlines()), "")
        said = f"the model's own {type(error).__name__} ({first})"
        return [Construct(said, caller(own[-1]) if own else None, INPUTS)]
    return []


def _codes() -> Mapping[CodeType, tuple[str, str]]:
    found = {}
    for (module, function), what in CALLS.items():
        code = getattr(getattr(import_module(module), function, None), "__code__", None)
        if code is not None:
            found[code] = what
    return found


@contextmanager
def _watching(found: list[Construct]) -> Iterator[None]:
    """Note the calls of `CALLS` and of custom autograd Functions."""
    codes, before = _codes(), sys.getprofile()
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if what := codes.get(frame.f_code):
            found.append(Construct(what[0], caller(frame), what[1]))
        elif frame.f_code is apply:
            found.extend(_custom(frame.f_locals["cls"], caller(frame)))

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


def _custom(kind: type, source: Source | None) -> list[Construct]:
    """A custom autograd Function; of torch's own, only the one that forbids `autograd.grad`."""
    if kind is CheckpointFunction:
        return [Construct("checkpoint(.., use_reentrant=True)", source, SAVED)]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    if not is_users(file):
        return []
    name = kind.__qualname__.rpartition("<locals>.")[2]
    return [Construct(f"the custom autograd.Function {name}", source, DETACH, of_gradients=True)]


class _Values(TorchFunctionMode):
    """Note where Python reads values out of a tensor."""

    def __init__(self, found: list[Construct]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        of_packing = frame.f_code.co_filename in (rnn.__file__, packing.__file__)
        if getattr(func, "__name__", "") in VALUES and not of_packing:
            name = f"a value of a tensor that Python reads, by {func.__name__},"
            self.found.append(Construct(name, caller(frame), NUMBER))
        return func(*args, **(kwargs or {}))
