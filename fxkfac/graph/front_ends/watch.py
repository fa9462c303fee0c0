"""What a graph depends on beside the values of inputs, parameters and buffers -> a key.

A graph holds what Python read of the model while it was traced: modes, numbers, hooks, which module
is where. The key is equal as long as all of that is; it is asked for at every batch, so what has
not moved since it was made is not looked at again.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from fxkfac.errors import ParameterError
from fxkfac.functional import FunctionalModel
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.front_ends.constants import Same
from fxkfac.graph.front_ends.memos import OWN
from fxkfac.graph.front_ends.reads import Reads, attribute_key, reads_of
from fxkfac.graph.quiet import quietly
from fxkfac.parameters import canonical
from fxkfac.reached import Reached, named_by, reached_from

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
IMMUTABLE = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


@dataclass
class Watch:
    """A model and, by module, which of its attributes count.

    Attributes:
        model: The user's.
        reads: What counts of these; of further ones all.
    """

    model: FunctionalModel
    reads: Reads = field(default_factory=Reads)
    _reached: Reached = field(default_factory=Reached)
    _modules: list[nn.Module] = field(default_factory=list)
    _objects: list[Any] = field(default_factory=list)
    _mutable: dict[int, tuple[Any, Hashable]] = field(default_factory=dict)
    _tokens: dict[Hashable, object] = field(default_factory=dict)  # of all that was found so far
    _key: Hashable = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """A watch on the model's copy, which looks at that anew and knows the same graphs."""
        model, tokens = copy.deepcopy((self.model, self._tokens), memo)
        return Watch(model, self.reads, _tokens=tokens)

    def key(self) -> Hashable:
        """Equal where a graph of the model is the same graph.

        Raises:
            ParameterError: The model has other parameters than when it was bound, or of another
                shape, or ties them in another way.
        """
        if not self._objects or not self._is_as_it_was():
            self._look()
        return self._key

    def _is_as_it_was(self) -> bool:
        objects = _objects(self._modules, self._reached)
        return (
            len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and all(attribute_key(value) == key for value, key in self._mutable.values())
        )

    def _look(self) -> None:
        self._objects = []
        require_bound(self.model)
        self._reached = reached_from(self.model.model)
        self._modules = self._reached.all_modules()
        places = {m: k for k, m in enumerate(self._modules)}
        self._mutable = {}
        is_function = not isinstance(self.model.model, nn.Module)
        parts = [self._of_module(m, places, is_function) for m in self._modules]
        functions = tuple(map(Same, self._reached.functions))
        moving = self.reads.moving
        values = enumerate(self._reached.values)
        held = tuple(Same(v) if k in moving else self._of_value(v) for k, v in values)
        # All of it would be hashed at every batch.
        everywhere = tuple(map(Same, _global_hooks()))
        self._key = self._tokens.setdefault((tuple(parts), functions, held, everywhere), object())
        self._objects = _objects(self._modules, self._reached)

    def _of_module(
        self, m: nn.Module, places: Mapping[nn.Module, int], by_identity: bool
    ) -> Hashable:
        known = self.reads.names
        names = known[places[m]] if places[m] < len(known) else None
        held = m.__dict__
        chosen = [n for n in held if n not in OWN] if names is None else sorted(names & held.keys())
        return (
            type(m),
            m.training,
            tuple(
                (name, places.get(part)) for name, part in m._modules.items() if part is not None
            ),
            tuple((kind, *map(Same, held[kind].values())) for kind in HOOKS if held[kind]),
            tuple((n, _of_tensor(t, by_identity)) for n, t in m._parameters.items()),
            tuple((n, _of_tensor(t, by_identity)) for n, t in m._buffers.items()),
            tuple((name, self._of_value(held[name])) for name in chosen),
        )

    def _of_value(self, value: Any) -> Hashable:
        key = attribute_key(value)
        if key != Same(value) and not _is_immutable(value):
            self._mutable[id(value)] = (value, key)
        return key


def _is_immutable(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_is_immutable, value))
    return isinstance(value, IMMUTABLE)


def watch_for(model: FlatModel, tensors: list[Tensor], watches: list[Watch]) -> Watch:
    """The watch on what one run of the model on these data reads; put to the others if it is new.

    Raises:
        CaptureError: The model draws random numbers that are not torch's.
    """
    reached = reached_from(model.bound.model)
    with quietly():
        reads = reads_of(model, tensors, reached.all_modules(), reached.values)
    watch = next((w for w in watches if w.reads == reads), None)
    if watch is None:
        watch = Watch(model.bound, reads)
        watches.append(watch)
    return watch


def _objects(modules: Iterable[nn.Module], reached: Reached) -> list[Any]:
    """What a model is made of, one level deep: as long as all are the same, so is the key."""
    found: list[Any] = [None]
    for m in modules:
        held = m.__dict__
        found.append(type(m))
        found += held.values()
        for part in (held["_modules"], held["_parameters"], held["_buffers"]):
            if part:
                found += part
                found += part.values()
        for kind in HOOKS:
            if held[kind]:
                found += held[kind].values()
    for function in reached.functions:
        found += named_by(function)
    return found + _global_hooks()


def _global_hooks() -> list[Any]:
    """Those of all modules, as `register_module_forward_hook` registers them."""
    return [hook for kind in HOOKS for hook in getattr(all_modules, f"_global{kind}", {}).values()]


def _of_tensor(t: Tensor | None, by_identity: bool) -> Hashable:
    """What a graph knows of a parameter or buffer; of one that is no argument of it, its values."""
    return t if t is None else (Same(t) if by_identity else (tuple(t.shape), t.dtype, t.device))


def require_bound(model: FunctionalModel) -> None:
    """Raise `ParameterError` unless a module's parameters are, but for values, those bound."""
    if not isinstance(model.model, nn.Module):
        return
    named = dict(model.model.named_parameters(remove_duplicate=False))
    known = {*model.tensors, *model.aliases}
    if named.keys() != known:
        lost, new = sorted(known - named.keys()), sorted(named.keys() - known)
        raise _changed(f"the parameters {lost} are gone, and {new} are new")
    for name, t in named.items():
        before = model.tensors[model.aliases.get(name, name)]
        if t.shape != before.shape:
            raise _changed(f"{name!r} has shape {tuple(t.shape)}, and had {tuple(before.shape)}")
    now, then = _tied(canonical(named)[1]), _tied(model.aliases)
    if now != then:
        raise _changed(f"tied are {[*map(sorted, now)]}, and were {[*map(sorted, then)]}")


def _tied(aliases: Mapping[str, str]) -> set[frozenset[str]]:
    """Names of one parameter."""
    names = set(aliases.values())
    return {frozenset([n, *(a for a, first in aliases.items() if first == n)]) for n in names}


def _changed(how: str) -> ParameterError:
    return ParameterError(
        f"the model has changed since it was traced: {how}; expected the same parameters with "
        "other values. Trace anew."
    )
