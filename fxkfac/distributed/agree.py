"""Before anything is summed, every rank tells all others what it has, in a few hundred bytes.

So that ranks which differ are named on every rank, and none waits for what will not come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from textwrap import shorten

import torch

from fxkfac.curvature.plan import BlockPlan
from fxkfac.distributed.parts import Part, factors_of, numbers_of_rows, pieces, shared_inputs
from fxkfac.distributed.workers import Workers, failure_of
from fxkfac.errors import MergeError


@dataclass(frozen=True)
class Has:
    """What a rank has.

    Attributes:
        failure: What it has failed with; all else is empty then.
        asked: A fingerprint of program and settings.
        layout: A fingerprint of the shapes and dtypes of its tensors; empty without data.
        n, count: Number of data, and what `reduction="mean"` divides by.
        rows: Number of rows of every product; `None` where groups have rows of their own.
        shared: For every product, the first one with the same A.
    """

    failure: str | None = None
    asked: str = ""
    layout: str = ""
    n: int = 0
    count: float = 0.0
    rows: tuple[int | None, ...] = ()
    shared: tuple[int, ...] = ()

    @staticmethod
    def of(part: Part | Exception) -> Has:
        """What a rank with this result, or error, has."""
        if isinstance(part, Exception):
            return Has(failure_of(part))
        factors = factors_of(part)
        return Has(
            None,
            _fingerprint(_asked(part)),
            _fingerprint(_layout(part)) if factors.n else "",
            factors.n,
            factors.count,
            numbers_of_rows(factors),
            shared_inputs(factors),
        )


def agreed(workers: Workers, part: Part | Exception, device: torch.device) -> list[Has]:
    """What every rank has, all of it parts of one computation.

    Raises:
        MergeError: Ranks differ in program or settings.
        RankError: A rank failed. That rank's own error is raised there.
    """
    heard = workers.gather(Has.of(part), device)
    own = part if isinstance(part, Exception) else None
    workers.require_all([h.failure for h in heard], own)
    assert not isinstance(part, Exception)
    if len({h.asked for h in heard}) > 1:
        _refuse(workers, workers.gather(_asked(part), device))
    if len({h.layout for h in heard if h.n}) > 1:
        _refuse(workers, workers.gather(_layout(part), device))
    return heard


def common_inputs(shared: Sequence[Sequence[int]]) -> list[int]:
    """For every product, the first one with the same A on all ranks."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(same, k) for k, same in enumerate(zip(*shared, strict=True))]


def _asked(part: Part) -> dict[str, str]:
    """How a part was computed, in words that do not change from process to process."""
    factors = factors_of(part)
    said = {key: repr(value) for key, value in vars(factors.settings).items()}
    uses = {name: _structure(plan) for name, plan in sorted(factors.plans.items())}
    return {"result": type(part).__name__, **said, "uses": repr(uses)}


def _structure(plan: BlockPlan) -> object:
    return plan.identities, plan.shapes


def _layout(part: Part) -> dict[str, str]:
    return {f"{piece.what} of {piece.name}": str(piece) for piece, _ in pieces(part)}


def _fingerprint(said: Mapping[str, str]) -> str:
    return sha256(repr(said).encode()).hexdigest()


def _refuse(workers: Workers, heard: Sequence[Mapping[str, str]]) -> None:
    """Name the ranks that differ from the first one that has anything, and in what."""
    first = next(place for place, said in enumerate(heard) if said)
    lines = []
    for place, said in enumerate(heard):
        keys = [k for k in {**heard[first], **said} if said and said.get(k) != heard[first].get(k)]
        lines += [
            f"{workers.name([place])} has {_said(said, key)} where {workers.name([first])} has "
            f"{_said(heard[first], key)}"
            for key in keys[:3]
        ]
    raise MergeError(
        f"{'; '.join(lines)}; expected parts of one computation on all ranks. Trace the same "
        "model with the same arguments everywhere, and ask for the same."
    )


def _said(said: Mapping[str, str], key: str) -> str:
    return f"{key} = {shorten(said[key], 160)}" if key in said else f"no {key}"
