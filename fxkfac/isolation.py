"""Running the user's model and leaving nothing changed: random state, parameters, buffers.

And the other way round: the user's autocast is for the model, not for the arithmetic around it.
"""

from __future__ import annotations

import cmath
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.linalg import vector_norm

from fxkfac.errors import CaptureError, OptionError

_drawing = RLock()  # the state is the process's: threads take turns


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Give the global random state back as it was; in between draw from `seed`, if there is one."""
    with _drawing:
        generators = _global_generators()
        states = [g.get_state() for g in generators]
        try:
            if seed is not None:
                for g in generators:
                    g.manual_seed(seed)
            yield
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)


def random_state() -> Tensor:
    """The global random state, of all devices: equal as long as nobody draws."""
    return torch.cat([g.get_state() for g in _global_generators()])


@contextmanager
def no_draws(expected: str) -> Iterator[None]:
    """Raise `OptionError`, with what was expected of it, where a model inside draws numbers."""
    with own_randomness():
        before = random_state()
        yield
        has_drawn = not torch.equal(before, random_state())
    if has_drawn:
        raise OptionError(
            "the model draws random numbers while it runs, as dropout does in training; expected "
            f"{expected}. Call model.eval() first."
        )


def _global_generators() -> list[Generator]:
    on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *on_gpus]


def require_gradients_on() -> None:
    """Raise `CaptureError` where no gradient can be taken."""
    if torch.is_inference_mode_enabled():
        raise CaptureError(
            "torch.inference_mode() is on, and gradients are needed; expected that they can be "
            "taken. Leave inference mode around this call; torch.no_grad() does no harm."
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise CaptureError(
            "this call is inside a transform of torch.func, such as grad or vmap, whose tensors "
            "have no values of their own; expected plain tensors. Call it outside."
        )


def without_graph(t: Tensor) -> Tensor:
    """The same without a graph; a copy of one that inference mode has made, for a graph to keep.

    Or of one that is conjugated or negated when it is read: not every op of a graph does so.
    """
    plain = t.detach().resolve_conj().resolve_neg()
    return plain.clone() if plain.is_inference() else plain


def seed_from(generator: Generator) -> int:
    """The next seed that a generator draws."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def generator_on(device: torch.device, generator: Generator) -> Generator:
    """A generator that draws on this device: itself, or one there that it gives the seed of."""
    if generator.device == device:
        return generator
    return Generator(device).manual_seed(seed_from(generator))


def is_finite(t: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: its sum tells, unless that alone overflows."""
    return cmath.isfinite(t.sum().item()) or bool(t.isfinite().all())


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """The same of many, and of their squares: one number, their norm, tells, and is waited for.

    False where that alone overflows.
    """
    alike: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        alike.setdefault(t.device, []).append(t)
    norms = (torch.stack(torch._foreach_norm(some)) for some in alike.values())
    return all(cmath.isfinite(vector_norm(each).item()) for each in norms)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or Inf, if one does."""
    if are_finite(tensors.values()):
        return None
    return next((name for name, t in tensors.items() if not t.isfinite().all()), None)


@contextmanager
def in_place_of(tensors: Mapping[int, Tensor], module: nn.Module) -> Iterator[None]:
    """Put tensors in the place of a module's own, by these ones' `id`, and put all back after.

    `torch.func.functional_call` names each place and fails to put back a module that is registered
    under two names; this looks at each module once. Whatever ran inside, afterwards the module
    holds the very objects it held before.
    """
    held = [(m, dict(m._parameters), dict(m._buffers), _flat(m)) for m in module.modules()]
    try:
        for m, parameters, buffers, flat in held:
            m._parameters.update({k: tensors.get(id(p), p) for k, p in parameters.items()})  # type: ignore[misc]
            m._buffers.update({k: tensors.get(id(b), b) for k, b in buffers.items()})
            if "_flat_weights" in flat:
                m._flat_weights = [tensors.get(id(p), p) for p in flat["_flat_weights"]]  # type: ignore[assignment]
        yield
    finally:
        for m, parameters, buffers, flat in held:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            for name, parts in flat.items():
                setattr(m, name, parts)


@contextmanager
def held_by(modules: Iterable[nn.Module], values: Iterable[Any] = ()) -> Iterator[None]:
    """Afterwards they hold the very objects they held, and lists and dicts what was in them.

    Generators among these, and other values that are one, are in the state in which they were.
    Neither do models leave that, which count their calls or keep what they computed, nor does
    export, which puts copies in place.
    """
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    contents: dict[int, tuple[Any, Any]] = {}
    for own, _ in attributes:
        _note_contents(own, contents)
        contents.pop(id(own["_buffers"]), None)  # what a first call registers is a graph's input
    for value in values:
        if type(value) is Generator:
            _note_contents(value, contents)
    try:
        yield
    finally:
        for own, before in attributes:
            own.update(before)
        for value, before in contents.values():
            _put_back(value, before)


CONTAINERS = (dict, OrderedDict, defaultdict, list, deque)


def _note_contents(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """What is in a container, and in those that it holds; and in which state generators are."""
    kind = type(value)
    if kind is Generator:
        found[id(value)] = value, value.get_state()
    if id(value) in found or kind not in (*CONTAINERS, tuple):
        return
    parts = list(value.values()) if isinstance(value, dict) else list(value)
    if kind is not tuple:
        found[id(value)] = value, (dict(value) if isinstance(value, dict) else parts)
    for part in parts:
        _note_contents(part, found)


def _put_back(value: Any, before: Any) -> None:
    """Put back the state of a generator; or what was in a container, unless it is there."""
    if isinstance(value, Generator):
        value.set_state(before)
    elif isinstance(value, dict):
        is_there = list(map(id, value.values())) == list(map(id, before.values()))
        if not is_there or value.keys() != before.keys():
            value.clear()
            value.update(before)
    elif list(map(id, value)) != list(map(id, before)):
        value.clear()
        value.extend(before)


def _flat(module: nn.Module) -> dict[str, Any]:
    """The lists by which a recurrent module holds its parameters a second and a third time."""
    lists = {name: getattr(module, name, None) for name in ("_flat_weights", "_flat_weight_refs")}
    return {name: held for name, held in lists.items() if held is not None}


DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Autocast:
    """Where autocast is on: for every such device, the dtype to which it casts."""

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @staticmethod
    def now() -> Autocast:
        """What the caller has on, also where `full_precision` has switched it off."""
        on = [d for d in DEVICES if torch.is_autocast_enabled(d)]
        here = Autocast(tuple((d, torch.get_autocast_dtype(d)) for d in on))
        return _callers.get() or here

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have the same on, and nothing else changed."""
        with ExitStack() as stack:
            for device, dtype in self.dtypes:
                stack.enter_context(torch.autocast(device, dtype))
            yield


_callers: ContextVar[Autocast | None] = ContextVar("callers autocast", default=None)


@contextmanager
def missing_derivatives(error: Callable[[str], Exception]) -> Iterator[None]:
    """Raise an error, made of PyTorch's message, where it has no derivative of an op."""
    try:
        yield
    except RuntimeError as found:
        if "not implemented" not in str(found):
            raise
        raise error(str(found).rstrip(".")) from found


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave every product in the dtype of its factors, also where the caller has autocast on."""
    on = [device for device in DEVICES if torch.is_autocast_enabled(device)]
    if not on:
        yield
        return
    before = _callers.set(Autocast.now())
    try:
        with ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _callers.reset(before)
