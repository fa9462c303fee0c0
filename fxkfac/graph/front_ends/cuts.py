"""One run of the model, watched: where it has gradients of its own, which not every graph keeps.

On the data of the trace such a graph may have the model's gradients all the same, and lose them on
others: a clamp that is passed straight through, a scale held fixed that is one on small data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxkfac.errors import CaptureError
from fxkfac.graph.custom import applied_by
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.front_ends.capture import DATA
from fxkfac.graph.source import caller
from fxkfac.graph.uses.ir import Source


class Cut(NamedTuple):
    """Where gradients are the model's own.

    Attributes:
        name: What it is, and where.
        of_function: Whether a custom `autograd.Function` has them, in which another front end may
            find no linear op.
    """

    name: str
    of_function: bool


def first_cut(model: FlatModel, tensors: Sequence[Tensor], names: Sequence[str]) -> Cut | None:
    """What a front end above autograd loses of the gradients of these parameters, if anything.

    Raises:
        CaptureError: A tensor is detached in place, or a hook of a tensor, parameter or module
            changes a gradient, which no graph keeps.
    """
    seen, state = _Cuts(), model.state()
    leaves = {n: state[n].detach().requires_grad_() for n in names}
    for name, leaf in leaves.items():
        for hook in (model.bound.now(name)._backward_hooks or {}).values():
            leaf.register_hook(seen.heard(hook, f"the parameter {name!r}"))
    # Of the model's own errors tracing speaks.
    with suppress(Exception), _functions(seen), _hooks_of(model.bound.model, seen), seen:
        prediction = model.predict({**state, **leaves}, tensors)
        if seen.hooks and prediction.requires_grad:
            torch.autograd.grad(prediction.sum(), list(leaves.values()), allow_unused=True)
    if seen.refused is not None:
        raise CaptureError(seen.refused)
    return seen.found


class _Cuts(TorchFunctionMode):
    """Notes the first place where a tensor that asks for a gradient is cut off from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Cut | None = None
        self.hooks = 0
        self.is_inside = False  # a custom Function, whose forward pass is without gradients
        self.refused: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook:
            return self._hooked(*args, **kwargs)
        if func is Tensor.detach_ and _follows(args):
            self.refused = (
                f"a tensor is detached in place{_at(caller(sys._getframe(1)))}, which no graph "
                "keeps; expected another tensor. Write h = h.detach()."
            )
        follows = not self.is_inside and _follows((args, kwargs))
        out = func(*args, **kwargs)
        if follows and (name := _cut(func, out)):
            self.note(name, sys._getframe(1))
        return out

    def note(self, name: str, frame: Any, of_function: bool = False) -> None:
        """Note the first one; a custom Function as long as there is nothing else."""
        if self.found is None or (self.found.of_function and not of_function):
            self.found = Cut(f"it loses {name}{_at(caller(frame))}", of_function)

    def _hooked(self, t: Tensor, hook: Callable[..., Any]) -> Any:
        return t.register_hook(self.heard(hook, f"a tensor{_at(caller(sys._getframe(2)))}"))

    def heard(self, hook: Callable[..., Any], of: str) -> Callable[..., Any]:
        """The hook, whose result is looked at."""
        self.hooks += 1

        def hear(*gradients: Any) -> Any:
            changed = hook(*gradients)
            if changed is not None:
                self.refused = (
                    f"a hook of {of} gives another gradient in the place of its own, which no "
                    "graph keeps; expected gradients that are the model's. Write it as a custom "
                    "autograd.Function, or remove it."
                )
            return changed

        return hear


def _cut(func: Any, out: Any) -> str | None:
    """What a call is that has taken a tensor which asks for a gradient, and given one of none."""
    if func == DATA:
        return "a tensor's data"
    if torch.is_grad_enabled():
        return None
    given = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    return "a part without gradients" if any(t.is_floating_point() for t in given) else None


def _follows(values: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(values))


def _at(source: Source | None) -> str:
    return f" at {source}" if source else ""


@contextmanager
def _hooks_of(model: Any, seen: _Cuts) -> Iterator[None]:
    """Have it hear the backward hooks of a model's modules, too."""
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    found = [
        (n, hooks) for n, m in named.items() for hooks in (m._backward_hooks, m._backward_pre_hooks)
    ]
    before = [dict(hooks) for _, hooks in found]
    try:
        for name, hooks in found:
            for key, hook in hooks.items():
                hooks[key] = seen.heard(hook, f"the module {name!r}")
        yield
    finally:
        for (_, hooks), own in zip(found, before, strict=True):
            hooks.update(own)


@contextmanager
def _functions(seen: _Cuts) -> Iterator[None]:
    """Have it note the user's custom Functions, too."""

    def apply(own: Callable[..., Any], cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and _follows((args, kwargs)):
            seen.note(f"the custom autograd.Function {cls.__name__}", sys._getframe(1), True)
        before, seen.is_inside = seen.is_inside, True
        try:
            return own(cls, *args, **kwargs)
        finally:
            seen.is_inside = before

    with applied_by(apply):
        yield
