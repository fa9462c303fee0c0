"""Where in parameter space something was computed, by one number for each parameter.

The number is made of sums of the parameter's words of eight bytes modulo 2⁶⁴, which no order of
summation rounds otherwise: one look at each of them, and nothing is waited for. PyTorch's version
counters would cost less, but fused optimizers move parameters without counting. It is no checksum:
an even number of other signs within one stretch, or another order there, may pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxkfac.errors import MergeError
from fxkfac.graph.program import Program

FOLD = 1023  # words that are added before they are mixed: that costs no more than a look at them


@dataclass(frozen=True, eq=False)
class Point:
    """The values of parameters.

    Attributes:
        dtypes: For every parameter; values in another dtype are not compared.
        sums: For every one, (number,).
    """

    dtypes: Mapping[str, torch.dtype]
    sums: Tensor

    @staticmethod
    def of(state: Mapping[str, Tensor], names: Iterable[str]) -> Point:
        """The point of the tensors of these names."""
        chosen = {name: state[name] for name in names}
        return Point({name: t.dtype for name, t in chosen.items()}, _sums(list(chosen.values())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Point):
            return NotImplemented
        return self.dtypes == other.dtypes and self.sums.tolist() == other.sums.tolist()

    def moved(self, state: Mapping[str, Tensor]) -> list[str]:
        """The names of those parameters that have other values in `state`."""
        kept = {n: dtype for n, dtype in self.dtypes.items() if n in state}
        now = Point.of(state, (n for n, dtype in kept.items() if state[n].dtype == dtype))
        before = dict(zip(self.dtypes, self.sums.tolist(), strict=True))
        after = dict(zip(now.dtypes, now.sums.tolist(), strict=True))
        return [name for name in after if after[name] != before[name]]


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


def _sums(tensors: list[Tensor]) -> Tensor:
    """One number for each, (number,)."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    folded = [_folded(words(t)) for t in tensors]
    all_of_them = torch.cat(folded)
    # Signs are worth 2⁶³ in a sum, so that two of them are nothing; mixed into other digits they
    # are something.
    mixed = (all_of_them >> 29).bitwise_xor_(all_of_them)
    return torch.stack([part.sum() for part in mixed.split([len(f) for f in folded])])


def _folded(by_eight: Tensor) -> Tensor:
    """Fewer numbers: sums over stretches of odd length, which a change of all signs changes."""
    whole = len(by_eight) // FOLD
    if not whole:
        return by_eight
    sums = by_eight[: FOLD * whole].view(whole, FOLD).sum(1)
    return torch.cat([sums, by_eight[FOLD * whole :]])


def words(t: Tensor) -> Tensor:
    """The bytes of a tensor, by eights; the last ones are filled up with zeros."""
    # A copy where it is a part of something larger: a word must begin at a multiple of eight.
    own = t.detach().contiguous().flatten()
    if own.storage_offset() * own.element_size() % 8:
        own = own.clone()
    raw = own.view(torch.uint8)
    if len(raw) % 8:
        raw = torch.nn.functional.pad(raw, (0, 8 - len(raw) % 8))
    return raw.view(torch.int64)
