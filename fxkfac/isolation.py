"""Running the user's model and leaving nothing changed: random state, parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Give the global random state back as it was; in between draw from `seed`, if there is one."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        if seed is not None:
            torch.manual_seed(seed)
        yield


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
            if flat is not None:
                m._flat_weights = [tensors.get(id(p), p) for p in flat]  # type: ignore[assignment]
        yield
    finally:
        for m, parameters, buffers, flat in held:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            if flat is not None:
                m._flat_weights = flat  # type: ignore[assignment]


def _flat(module: nn.Module) -> list[Tensor] | None:
    """The list by which recurrent modules hold their parameters a second time."""
    return getattr(module, "_flat_weights", None)
