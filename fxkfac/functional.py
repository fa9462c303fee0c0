"""The user's model as a pure function: (module or function, named tensors, inputs) -> prediction.

Tracing, checking and the autodiff ground truth all call the model through this one object, so
that they mean the same thing by "the model", and so that nothing of the user's is changed:
parameters are passed in, buffers are copied before a run that could update them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxkfac.errors import FxkfacError, ParameterError, UnknownParameter
from fxkfac.isolation import Autocast, in_place_of, without_graph
from fxkfac.parameters import Params as Params
from fxkfac.parameters import (
    canonical,
    flatten_names,
    nest_names,
    require_alike,
    require_initialised,
)

Inputs = Any  # a tensor, a tuple or list of tensors, or a dict of keyword arguments


def prediction_of(output: Any) -> Tensor:
    """The one tensor in a model's output; of several by name, the `logits`."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    if len(tensors) != 1:
        raise FxkfacError(
            f"the model returns {type(output).__name__} with {len(tensors)} tensors; expected one "
            "tensor, the prediction that the loss takes, or one that is called 'logits'. Wrap "
            "the model in a function or module that returns that tensor alone."
        )
    return tensors[0]


def copied(data: Any) -> Any:
    """The same with copies of all tensors: a model may write into them, and autograd keep them."""
    return pytree.tree_map_only(Tensor, Tensor.clone, data)


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's call."""
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


@dataclass(frozen=True)
class FunctionalModel:
    """A module or a function `f(params, *inputs)` as a pure function of named tensors.

    Attributes:
        model: What the user handed in.
        structure: The user's nested params (functions only), `None` for a module.
        tensors: All parameters by name, one name per storage; the user's own tensors.
        aliases: Every further name of a tied parameter, mapped to the name in `tensors`.
        selected: The names whose curvature is asked for, in the model's order.
        replaced: Names whose tensors in `tensors` stand in the place of the module's own.
        autocast: What was on where the model was bound, and is on whenever it runs.
    """

    model: nn.Module | Callable[..., Any]
    structure: Params | None
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    selected: tuple[str, ...]
    replaced: frozenset[str] = frozenset()
    autocast: Autocast = field(default_factory=Autocast.now)

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Run the model with `tensors` in the place of its parameters and buffers of that name."""
        with self.holding(tensors) as model:
            return model(inputs)

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[Callable[[Inputs], Any]]:
        """The model as a function of its inputs, while it holds `tensors`."""
        missing = [name for name in self.tensors if name not in tensors]
        full = {**self.current(missing), **tensors}
        full |= {alias: full[name] for alias, name in self.aliases.items()}
        if not isinstance(self.model, nn.Module):
            assert self.structure is not None
            nested = nest_names(full, self.structure)
            yield lambda inputs: self._call(partial(self.model, nested), inputs)
            return
        # Batch norm and its kin write into buffers while they run: hand them copies.
        full |= {name: full.get(name, b).clone() for name, b in self.buffers().items()}
        own = dict(self.model.named_parameters(remove_duplicate=False)) | self.buffers()
        with in_place_of({id(held): full[name] for name, held in own.items()}, self.model):
            yield lambda inputs: self._call(self.model, inputs)

    def _call(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        args, kwargs = split_inputs(inputs)
        with self.autocast.again():
            return function(*args, **kwargs)

    def modules(self) -> list[nn.Module]:
        """The module and all inside; none for a function."""
        return list(self.model.modules()) if isinstance(self.model, nn.Module) else []

    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers by name, as they are now; empty for a function."""
        return dict(self.model.named_buffers()) if isinstance(self.model, nn.Module) else {}

    def current(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Parameters (all, without names) as they are now, detached from any graph."""
        names = self.tensors if names is None else names
        return {name: without_graph(self.now(name)) for name in names}

    def now(self, name: str) -> Tensor:
        """A parameter as it is now: a module may hold another one than when it was bound."""
        if not isinstance(self.model, nn.Module) or name in self.replaced:
            return self.tensors[name]
        *path, last = name.split(".")
        module: Any = self.model
        try:
            for part in path:
                module = module._modules[part]
            found: Tensor | None = module._parameters[last]
        except (KeyError, AttributeError):
            found = None
        if found is None:
            raise ParameterError(
                f"the model has changed since it was traced: {name!r} is gone. Trace anew."
            )
        return found

    def resolve(self, name: str) -> str:
        """The canonical name of a parameter. Raises `UnknownParameter` with near misses."""
        canonical = self.aliases.get(name, name)
        if canonical not in self.tensors:
            raise unknown(name, [*self.tensors, *self.aliases])
        return canonical

    def override(self, params: Params | None) -> dict[str, Tensor]:
        """All parameters, with the user's `params` (possibly nested) in their place."""
        values = self.current()
        given: dict[str, str] = {}
        for name, value in flatten_names({} if params is None else params).items():
            canonical = self.resolve(name)
            before = given.setdefault(canonical, name)
            if before != name:
                _require_one(values[canonical], value, (before, name))
            expected = values[canonical]
            if value.shape != expected.shape:
                raise ParameterError(
                    f"params[{name!r}] has shape {tuple(value.shape)}, but the model was bound "
                    f"with {tuple(expected.shape)}. Pass tensors of that shape, or trace anew."
                )
            if (value.dtype, value.device) != (expected.dtype, expected.device):
                raise ParameterError(
                    f"params[{name!r}] is {value.dtype} on {value.device}, but the model was bound "
                    f"with {expected.dtype} on {expected.device}. Convert it, or trace anew."
                )
            values[canonical] = without_graph(value)
        return values


def _require_one(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise `ParameterError` unless both names of a tied parameter have the same values."""
    if a.shape != b.shape or not bool((a == b).all()):
        raise ParameterError(
            f"params[{names[0]!r}] and params[{names[1]!r}] have different values, but were one "
            "parameter when the model was bound; expected one tensor for both. Trace with tensors "
            "of their own."
        )


def unknown(name: Any, known: Iterable[str], what: str = "parameter") -> UnknownParameter:
    """An error that names those whose names come closest."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) if isinstance(name, str) else []
    some = f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are: {some}."
    return UnknownParameter(f"no {what} matches {name!r}. {hint}")


def bind(
    model: nn.Module | Callable[..., Any], params: Params | Iterable[str] | None
) -> FunctionalModel:
    """Bind a model to its parameters and select those whose curvature is asked for.

    Args:
        model: A module, or a function `f(params, *inputs)` / `f(params, **inputs)`.
        params: For a function: its tensors, in dicts, lists or tuples; all are selected. For a
            module: names or patterns (as in a shell: `*`, `?`, `[..]`), or a dict of tensors
            that replace the module's own; `None` selects all that require gradients.

    Raises:
        UnknownParameter: A name or pattern matches nothing.
        ParameterError: A tensor of the wrong shape, parameters on different devices or dtypes, or
            none at all.
    """
    bound = (
        _bind_module(model, params)
        if isinstance(model, nn.Module)
        else _bind_function(model, params)
    )
    if not bound.selected:
        raise ParameterError(
            f"params selects none of the {len(bound.tensors)} tensors of the model; expected at "
            "least one of floating point. Pass or name the ones you want."
        )
    require_alike({name: bound.tensors[name] for name in bound.selected})
    return bound


def _bind_function(model: Callable[..., Any], params: Any) -> FunctionalModel:
    if not callable(model) or isinstance(model, type):
        raise ParameterError(
            f"the model is {model!r:.80}; expected a module, such as nn.Linear(4, 3), or a "
            "function f(params, x)."
        )
    if not isinstance(params, Mapping | list | tuple):
        found = "None" if params is None else type(params).__name__
        raise ParameterError(
            f"a function needs `params`, tensors in nested dicts, lists or tuples; found {found}. "
            "Call fxkfac with params={'weight': ..., 'bias': ...}."
        )
    tensors, aliases = canonical(flatten_names(params))
    if rotated := [name for name, t in tensors.items() if t.is_complex()]:
        raise ParameterError(
            f"the parameters {rotated[:4]} are complex; expected real ones. Pass real and "
            "imaginary parts, and put them together by torch.complex inside."
        )
    selected = tuple(name for name, t in tensors.items() if t.is_floating_point())
    return FunctionalModel(model, params, tensors, aliases, selected)


def _bind_module(module: nn.Module, params: Any) -> FunctionalModel:
    require_initialised(module)
    tensors, aliases = canonical(dict(module.named_parameters(remove_duplicate=False)))
    if params is None:
        selected = [name for name, t in tensors.items() if t.requires_grad]
        bound = FunctionalModel(module, None, tensors, aliases, tuple(selected))
        if not selected:
            raise ParameterError(
                f"none of the {len(tensors)} parameters of {type(module).__name__} requires "
                "gradients. Name the ones you want: params=['*'] for all."
            )
        return bound
    bound = FunctionalModel(module, None, tensors, aliases, ())
    if isinstance(params, Mapping):
        flat = {bound.resolve(name) for name in flatten_names(params)}
        tensors = {**tensors, **{n: t for n, t in bound.override(params).items() if n in flat}}
        chosen = _in_order(tensors, flat)
        return FunctionalModel(module, None, tensors, aliases, chosen, frozenset(flat))
    return FunctionalModel(
        module, None, tensors, aliases, _in_order(tensors, select(bound, params))
    )


def select(bound: FunctionalModel, patterns: str | Iterable[str]) -> set[str]:
    """The canonical names that match one of the names or shell patterns."""
    chosen: set[str] = set()
    names = [*bound.tensors, *bound.aliases]
    for pattern in patterns if _is_several(patterns) else [patterns]:
        if not isinstance(pattern, str):
            raise ParameterError(
                f"params holds a {type(pattern).__name__}; expected names of parameters, or shell "
                "patterns, as named_parameters() calls them. Say ['2.weight'] or ['2.*']."
            )
        matches = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
        if not matches:
            raise unknown(pattern, names)
        chosen |= {bound.aliases.get(n, n) for n in matches}
    return chosen


def _is_several(patterns: object) -> bool:
    return isinstance(patterns, Iterable) and not isinstance(patterns, str | Tensor)


def _in_order(tensors: Mapping[str, Tensor], chosen: set[str]) -> tuple[str, ...]:
    return tuple(name for name in tensors if name in chosen)
