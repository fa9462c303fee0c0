"""Custom `autograd.Function`s as single nodes of a graph, their backward included.

A front end records the ops of the forward pass, and with them loses a backward that is not theirs.
While `whole_functions` is on, `make_fx` records the call itself: the node runs the user's Function,
and autograd through the graph runs the user's backward. A parameter that enters one has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    FunctionalizeInterpreter,
    retrieve_current_functorch_interpreter,
)
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import Function
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxkfac.errors import UnsupportedUse

NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
PLAIN = (Tensor, *NUMBERS, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Whole:
    """A call of a custom Function, as the target of a node."""

    function: type[Function]

    @property
    def __name__(self) -> str:
        return self.function.__qualname__.rpartition("<locals>.")[2]

    def __call__(self, *args: Any) -> Any:
        """Run the user's Function."""
        if not torch._C._are_functorch_transforms_active():
            return self.function.apply(*args)
        interpreter = retrieve_current_functorch_interpreter()
        if isinstance(interpreter, FunctionalizeInterpreter):
            level = FunctorchFunctionalizeAPI(interpreter)
            with level.redispatch_to_next():
                return level.wrap_tensors(self(*level.unwrap_tensors(args)))
        if self.function.setup_context is Function.setup_context:
            raise UnsupportedUse(
                f"the custom autograd.Function {self} has no setup_context, and so no gradient for "
                "each datum, which an exact block without normal form is made of. Give it one and "
                "generate_vmap_rule = True, or another structure to the parameters below it."
            )
        return self.function.apply(*args)

    def __str__(self) -> str:
        return self.__name__


Marked = Callable[[], AbstractContextManager[None]]  # in which a node is given the line of the user


@contextmanager
def whole_functions(marked: Marked) -> Iterator[None]:
    """Let `make_fx` record calls of custom Functions as what they are."""

    def apply(own: Callable[..., Any], cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        tracing = get_proxy_mode() is not None
        if tracing and not kwargs and _can_be_whole(cls, args):
            with marked():
                return _record(cls, args)
        return own(cls, *args, **kwargs)

    with applied_by(apply):
        yield


@contextmanager
def applied_by(apply: Callable[..., Any]) -> Iterator[None]:
    """Have every Function applied by this, which is given torch's own way first."""
    inherited = Function.__dict__["apply"]

    def instead(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        return apply(inherited.__func__, cls, *args, **kwargs)

    Function.apply = classmethod(instead)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Function.apply = inherited  # type: ignore[method-assign]


def _can_be_whole(function: type[Function], args: tuple[Any, ...]) -> bool:
    """Whether it is the user's, of plain arguments, and at no transform's inner level."""
    own = not function.__module__.startswith("torch.")
    plain = all(isinstance(a, PLAIN) for a in pytree.tree_leaves(args))
    return own and plain and not torch._C._are_functorch_transforms_active()


def _record(function: type[Function], args: tuple[Any, ...]) -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer
    proxies = pytree.tree_map(lambda a: _proxy(a, tracer), args)
    with disable_proxy_modes_tracing(), _OnlyThese(args, tracer, Whole(function)):
        out = Whole(function)(*args)
    node = tracer.create_proxy("call_function", Whole(function), proxies, {})
    return track_tensor_tree(out, node, constant=None, tracer=tracer)


def _proxy(value: Any, tracer: Any) -> Any:
    if isinstance(value, Tensor):
        slot: Any = get_proxy_slot(value, tracer, value)
        return getattr(slot, "proxy", slot)
    return tracer.unwrap_proxy(value)


class _OnlyThese(TorchDispatchMode):
    """Refuses what enters by another way than an argument: the graph would hold its old value."""

    def __init__(self, args: tuple[Any, ...], tracer: Any, whole: Whole) -> None:
        super().__init__()
        self.tracer, self.whole = tracer, whole
        self.known = {self._place(a) for a in pytree.tree_leaves(args) if isinstance(a, Tensor)}

    def _place(self, t: Tensor) -> Any:
        proxy = _proxy(t, self.tracer)
        return proxy.node if isinstance(proxy, Proxy) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in pytree.tree_leaves((args, kwargs)):
            place = self._place(t) if isinstance(t, Tensor) else None
            if place is not None and place not in self.known:
                raise RuntimeError(
                    f"the custom autograd.Function {self.whole} reads {place.name}, which is not "
                    "among its arguments; pass it as one"
                )
        return func(*args, **(kwargs or {}))
