"""Where in parameter space something was computed, by some entries of every parameter.

That costs next to nothing, and nothing is waited for. Version counters would say more, but
fused optimizers move parameters without counting. A change of a few entries may pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxkfac.errors import MergeError
from fxkfac.graph.program import Program

ENTRIES = 256  # of a parameter that are looked at, at most


@dataclass(frozen=True, eq=False)
class Point:
    """The values of parameters.

    Attributes:
        copies: Entries of parameters of one dtype and device after one another, with each name and
            how many are its own; those of another dtype are not compared.
    """

    copies: Sequence[tuple[Tensor, Mapping[str, int]]]

    @staticmethod
    @torch.no_grad()
    def of(state: Mapping[str, Tensor], names: Iterable[str]) -> Point:
        """The point of the tensors of these names."""
        alike: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name in names:
            t = state[name]
            alike.setdefault((t.dtype, t.device), {})[name] = _some(t)
        # A copy of all at once is one call.
        return Point(
            [
                (torch.cat(list(some.values())), {name: t.numel() for name, t in some.items()})
                for some in alike.values()
            ]
        )

    @property
    def entries(self) -> dict[str, Tensor]:
        """Of every parameter."""
        found: dict[str, Tensor] = {}
        for together, sizes in self.copies:
            found.update(zip(sizes, together.split(list(sizes.values())), strict=True))
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Point):
            return NotImplemented
        mine, theirs = self.entries, other.entries
        return mine.keys() == theirs.keys() and all(_equal(t, theirs[n]) for n, t in mine.items())

    @torch.no_grad()
    def moved(self, state: Mapping[str, Tensor]) -> list[str]:
        """The names of those parameters that have other values in `state`."""
        kept = {name: t for name, t in self.entries.items() if name in state}
        return [
            name
            for name, t in kept.items()
            if state[name].dtype == t.dtype and not _equal(t, _some(state[name]))
        ]


def here(program: Program, state: Mapping[str, Tensor]) -> Point:
    """The point of all parameters on which a prediction depends, in any graph so far."""
    used = {name for tapped in program.graphs for name in tapped.captured.used}
    return Point.of(state, (name for name in program.model.tensors if name in used))


def require_here(then: Point | None, state: Mapping[str, Tensor]) -> None:
    """Raise `MergeError` where it is known that factors were computed at other parameters."""
    if then is not None and (moved := then.moved(state)):
        raise MergeError(
            f"the parameters {moved[:4]} have other values than when the factors were computed; "
            "expected factors at the parameters as they are. Compute the factors anew, or pass "
            "by `params` what they were computed at."
        )


def _some(t: Tensor) -> Tensor:
    """Entries at equal distances."""
    numel = t.numel()
    distance = max(1, -(-numel // ENTRIES))
    if t.is_contiguous():  # one call in the place of three
        return t.as_strided((-(-numel // distance),), (distance,))
    return t.reshape(-1)[::distance]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
