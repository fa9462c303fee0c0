"""Parameters by name: which names are one parameter, and what all of them must have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxkfac.errors import OptionError, ParameterError

Params = Mapping[str, Any] | list[Any] | tuple[Any, ...]  # tensors, nested by name or position


def require_initialised(module: nn.Module) -> None:
    """Raise `ParameterError` where a lazy module does not know its shapes yet."""
    held = [*module.named_parameters(), *module.named_buffers()]
    if lazy := [name for name, t in held if is_lazy(t)]:
        raise ParameterError(
            f"{', '.join(lazy[:4])} of {type(module).__name__} have no shape yet, as a lazy module "
            "has none before its first call; expected initialised tensors. Run the model once on a "
            "batch, then trace."
        )


def canonical(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One name per storage: tied parameters keep the name that comes first."""
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named.items():
        key = id(tensor) if tensor.numel() == 0 else _storage_key(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return {name: named[name] for name in first.values()}, aliases


def canonical_names(names: Iterable[str], canonical: Callable[[str], str]) -> dict[str, str]:
    """For every name the one by which blocks know it. Raises `OptionError` for two of one."""
    found = {name: canonical(name) for name in names}
    if len(set(found.values())) < len(found):
        raise OptionError(
            f"two of {list(found)} are names of one tied parameter; expected each parameter once, "
            "under any of its names."
        )
    return found


def _storage_key(tensor: Tensor) -> object:
    place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
    return place if tensor.device.type != "meta" else id(tensor)


def require_alike(selected: Mapping[str, Tensor]) -> None:
    """Raise `ParameterError` unless all are on one device and of one dtype."""
    for what in ("device", "dtype"):
        groups: dict[torch.device | torch.dtype, list[str]] = {}
        for name, tensor in selected.items():
            groups.setdefault(getattr(tensor, what), []).append(name)
        if len(groups) > 1:
            found = "; ".join(f"{key}: {', '.join(names[:3])}" for key, names in groups.items())
            raise ParameterError(
                f"parameters have different {what}s ({found}); expected one {what}. "
                f"Move them to one {what}, or select those of one {what} by `params`."
            )


def flatten_names(params: Params, prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dicts, lists and tuples of tensors; keys and positions are joined by dots."""
    if not isinstance(params, Mapping | list | tuple):
        raise ParameterError(
            f"params is of type {type(params).__name__}; expected tensors in a dict, list or "
            "tuple. Targets go with their inputs, as one pair: (inputs, targets)."
        )
    flat: dict[str, Tensor] = {}
    for key, value in _items(params):
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | list | tuple):
            found = flatten_names(value, f"{name}.")
        elif isinstance(value, Tensor):
            found = {name: value}
        else:
            raise ParameterError(
                f"params[{name!r}] is of type {type(value).__name__}; expected a tensor, or a "
                "dict, list or tuple of tensors. Pass what is not a tensor by closure instead."
            )
        if twice := found.keys() & flat.keys():
            raise ParameterError(
                f"two tensors of params are called {min(twice)!r}, since keys are joined by dots; "
                "expected a name for each. Call one of them otherwise."
            )
        flat |= found
    return flat


def nest_names(flat: Mapping[str, Tensor], like: Params, prefix: str = "") -> Any:
    """Inverse of `flatten_names`: give the tensors in `flat` the nesting of `like`."""
    nested = {
        key: nest_names(flat, value, f"{prefix}{key}.")
        if isinstance(value, Mapping | list | tuple)
        else flat[f"{prefix}{key}"]
        for key, value in _items(like)
    }
    if isinstance(like, Mapping):
        return nested
    if hasattr(like, "_fields"):  # a named tuple
        return type(like)(*nested.values())
    return type(like)(nested.values())


def _items(params: Params) -> Iterable[tuple[Any, Any]]:
    return params.items() if isinstance(params, Mapping) else enumerate(params)
