"""Where two taps of a window meet: on boxes of positions, which many pairs of taps share.

The entry of two taps k, l and two channels is Σ_u x[u] x[u + δ] with δ = (l − k) · dilation: away
from the border it depends on the difference of the taps alone, so that a 3 × 3 kernel has 13
products of the image with itself, moved, in place of 45. Where the windows leave part of the image
out, the sum runs over an interval; it is the sum over everything minus what lies before and behind,
and these are thin. All this happens along each dimension by itself.

    Σ_u over [low, high)  =  Σ_u over all  −  Σ_u before low  −  Σ_u from high on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from fxkfac.linalg.windows import Axis

KNOWN = 256  # windows on images of one size: the same for every vector and every batch
MOST = 1024  # boxes, or pairs of taps along one dimension


class Run(NamedTuple):
    """Σ_u x[u] x[u + shift] for u in [low, high), along one dimension."""

    shift: int
    low: int
    high: int

    def turned(self) -> Run:
        """The same sum, with the two factors in the other order."""
        return Run(-self.shift, self.low + self.shift, self.high + self.shift)

    @property
    def length(self) -> int:
        """The number of its terms."""
        return self.high - self.low


def whole(shift: int, size: int) -> Run:
    """The run over everything that has a partner in the image."""
    return Run(shift, max(0, -shift), min(size, size - shift))


Box = tuple[Run, ...]  # one run along every dimension
Sizes = tuple[int, int, int]  # numbers of data, of groups, and of channels in one


@dataclass(frozen=True)
class Boxes:
    """Which products are taken, and how those of windows are made of them.

    Attributes:
        boxes: One product of channels with channels for each.
        turned: For every box, the number of the one with its factors in the other order. Only the
            first of the two is taken.
        terms: For all pairs of taps, in order, the boxes that add up to theirs, with their signs.
    """

    boxes: tuple[Box, ...]
    turned: tuple[int, ...]
    terms: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def taken(self) -> dict[int, Box]:
        """Those that are taken, by their numbers."""
        return {k: self.boxes[k] for k, other in enumerate(self.turned) if k <= other}


@lru_cache(maxsize=KNOWN)
def has_few_boxes(axes: tuple[Axis, ...]) -> bool:
    """Whether windows have stride one, and not too many boxes to be worth it."""
    if any(axis.stride > 1 or axis.kernel**2 > MOST for axis in axes):
        return False
    return prod(len(_runs(_terms_of_pairs(axis))) for axis in axes) <= MOST


@lru_cache(maxsize=KNOWN)
def boxes_of(axes: tuple[Axis, ...]) -> Boxes:
    """Those of windows with stride one."""
    along = [_terms_of_pairs(axis) for axis in axes]
    boxes = tuple(product(*map(_runs, along)))
    number = {box: k for k, box in enumerate(boxes)}
    turned = tuple(number[tuple(r.turned() for r in box)] for box in boxes)
    return Boxes(boxes, turned, tuple(_terms(axes, along, number, turned)))


def _terms(
    axes: tuple[Axis, ...],
    along: list[list[dict[Run, int]]],
    number: Mapping[Box, int],
    turned: tuple[int, ...],
) -> list[tuple[tuple[int, int], ...]]:
    """Those of (l, k) are those of (k, l) turned, in the same order: so sums are symmetric."""
    taps = list(product(*(range(axis.kernel) for axis in axes)))
    found: list[tuple[tuple[int, int], ...]] = []
    for k, first in enumerate(taps):
        for m, second in enumerate(taps):
            if m < k:
                found.append(tuple((turned[b], sign) for b, sign in found[m * len(taps) + k]))
                continue
            pairs = zip(axes, along, first, second, strict=True)
            runs = product(*(terms[i * a.kernel + j].items() for a, terms, i, j in pairs))
            found.append(tuple(_product(some, number) for some in runs))
    return found


def _product(along: tuple[tuple[Run, int], ...], number: Mapping[Box, int]) -> tuple[int, int]:
    """The box of a run along every dimension, and its sign."""
    return number[tuple(run for run, _ in along)], prod(sign for _, sign in along)


def _terms_of_pairs(axis: Axis) -> list[dict[Run, int]]:
    """For all pairs of taps along one dimension, the runs that add up to theirs."""
    return [_along(axis, k, m) for k in range(axis.kernel) for m in range(axis.kernel)]


def _runs(terms: list[dict[Run, int]]) -> list[Run]:
    """All of them; a shift forwards comes before the one backwards: what is taken lies behind."""
    return sorted({run for pair in terms for run in pair}, key=lambda r: (-r.shift, r))


def _along(axis: Axis, k: int, m: int) -> dict[Run, int]:
    """The run of two taps as the whole one without its ends, or, if that is shorter, itself."""
    shift, first = (m - k) * axis.dilation, k * axis.dilation - axis.before
    everything = whole(shift, axis.size)
    low, high = max(everything.low, first), min(everything.high, first + axis.places)
    if low >= high:
        return {}
    if high - low <= everything.length - (high - low):
        return {Run(shift, low, high): 1}
    ends = [Run(shift, everything.low, low), Run(shift, high, everything.high)]
    return {everything: 1} | {run: -1 for run in ends if run.length}
