"""How factors are computed, and in what two computations differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What must be equal for two partial results to be parts of one."""

    fisher: str
    sharing: str
    mc_samples: int
    separate_weight_and_bias: bool
    masked: bool  # whether padding is left out
    loss: str
    parameters: Mapping[str, tuple[int, ...]]  # those with a block, and their shapes
    structures: Mapping[str, str]  # what each one's block is made of


SOME = 4  # names, of those that differ


def differences(mine: Settings, others: Settings) -> dict[str, tuple[Any, Any]]:
    """What differs, here and there; of parameters only some of those that do."""
    found = {}
    for one in fields(Settings):
        here, there = getattr(mine, one.name), getattr(others, one.name)
        if here == there:
            continue
        if isinstance(here, Mapping):
            names = [n for n in {**here, **there} if here.get(n) != there.get(n)][:SOME]
            here, there = ({n: m[n] for n in names if n in m} for m in (here, there))
        found[one.name] = here, there
    return found
