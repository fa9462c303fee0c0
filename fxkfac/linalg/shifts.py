"""Image -> Σ patch patchᵀ without patches, where windows lie at every position (stride one).

The entry of two taps k, l and two channels is Σ_u x[u] x[u + δ] with δ = (l − k) · dilation: away
from the border it depends on the difference of the taps alone, so that a 3 × 3 kernel has 15
products of the image with itself, moved, in place of 81: together they are the weight gradient of
one convolution. Where the windows leave part of the
image out, the sum runs over an interval; it is the sum over everything minus what lies before and
behind, and these are thin. All this happens along each dimension by itself.

    Σ_u over [low, high)  =  Σ_u over all  −  Σ_u before low  −  Σ_u from high on
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.correlation import add_part, correlation, has_wide_vectors
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.made_once import made_once
from fxkfac.linalg.products import chunk_numel
from fxkfac.linalg.windows import Axis

if TYPE_CHECKING:
    from jaxtyping import Float


ROWS = 4  # times as many rows as channels at least, or adding up costs as much as multiplying
VECTOR = 8  # channels: fewer take as long
NARROW = 2  # times as long as a product's a convolution's multiply-add takes without AVX-512
# What else takes time beside these, in multiply-adds: measured for 3 to 512 channels.
CONVOLUTION = 2**25  # for every one, however small
MOVED = 200  # for every number that one reads;
MOVED_WITHOUT_KERNEL = 2500  # where it has to copy patches itself, as in double precision
SCATTERED = 450  # for every number of the sum


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


Span = tuple[int, int]  # start and length along a dimension
Box = tuple[Run, ...]  # one run along every dimension


@dataclass(frozen=True)
class Correlation:
    """Boxes that differ by shifts along whole dimensions alone: the weight gradient of one conv.

    Attributes:
        boxes: Their numbers.
        places: For each one, where its product is in the flat kernel.
        reach: What they read of the image, (start, length) along each dimension.
        first: What the first factor has of that, likewise.
        second: The second one's, which may begin before it and end behind.
        kernel: The number of shifts along each dimension.
    """

    boxes: tuple[int, ...]
    places: tuple[int, ...]
    reach: tuple[Span, ...]
    first: tuple[Span, ...]
    second: tuple[Span, ...]
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which products are taken, and how the patches' products are made of them.

    Attributes:
        boxes: One product of channels with channels for each.
        turned: For every box, the number of the one with its factors in the other order.
        correlations: How the boxes are computed of which no other one is the transpose.
    """

    boxes: tuple[Box, ...]
    turned: tuple[int, ...]
    correlations: tuple[Correlation, ...]


@lru_cache(maxsize=256)  # the same for every vector and every batch
def plan(axes: tuple[Axis, ...]) -> Plan:
    """The products for windows with stride one."""
    boxes = tuple(product(*(_runs(_terms_of_pairs(axis)) for axis in axes)))
    number = {box: k for k, box in enumerate(boxes)}
    turned = tuple(number[tuple(r.turned() for r in box)] for box in boxes)
    taken = {k: boxes[k] for k, other in enumerate(turned) if k <= other}
    return Plan(boxes, turned, tuple(_correlations(taken, axes)))


@made_once
def weights(axes: tuple[Axis, ...]) -> Float[Tensor, "pairs boxes"]:
    """What a pair of taps takes of every box: 1, −1 or 0."""
    joined = torch.ones(1, 1, 1, device="cpu")
    for axis in axes:
        terms = _terms_of_pairs(axis)
        table = [[float(pair.get(run, 0)) for run in _runs(terms)] for pair in terms]
        along = torch.tensor(table, device="cpu").view(axis.kernel, axis.kernel, -1)
        joined = torch.einsum("kmr,lns->klmnrs", joined, along)
        joined = rearrange(joined, "k l m n r s -> (k l) (m n) (r s)")
    return joined.flatten(0, 1)


def _correlations(taken: Mapping[int, Box], axes: tuple[Axis, ...]) -> Iterator[Correlation]:
    """Put boxes together that have the same runs along the dimensions that are not whole."""
    alike: dict[tuple[Run | None, ...], list[int]] = {}
    for k, box in taken.items():
        ends = [None if _is_whole(r, a) else r for r, a in zip(box, axes, strict=True)]
        alike.setdefault(tuple(ends), []).append(k)
    for fixed, numbers in alike.items():
        spans, starts, kernel = [], [], []
        for dim, (end, axis) in enumerate(zip(fixed, axes, strict=True)):
            shifts = [taken[k][dim].shift for k in numbers]
            spans.append((0, axis.size) if end is None else (end.low, end.length))
            starts.append(min(shifts))
            kernel.append((max(shifts) - min(shifts)) // axis.dilation + 1)
        places = [
            reduce(
                lambda flat, at: flat * at[0] + (at[1].shift - at[2]) // at[3].dilation,
                zip(kernel, taken[k], starts, axes, strict=True),
                0,
            )
            for k in numbers
        ]
        along = [
            _reach(span, (span[0] + start, span[1] + (size - 1) * axis.dilation), axis)
            for span, start, size, axis in zip(spans, starts, kernel, axes, strict=True)
        ]
        reach, first, second = (tuple(spans[k] for spans in along) for k in range(3))
        yield Correlation(tuple(numbers), tuple(places), reach, first, second, tuple(kernel))


def _reach(first: Span, second: Span, axis: Axis) -> tuple[Span, Span, Span]:
    """What two spans have of the image together, and both of them as parts of that."""
    ends = [start + length for start, length in (first, second)]
    low, high = max(0, min(first[0], second[0])), min(axis.size, max(ends))
    return (low, high - low), (first[0] - low, first[1]), (second[0] - low, second[1])


def _is_whole(run: Run, axis: Axis) -> bool:
    return run == whole(run.shift, axis.size)


def _terms_of_pairs(axis: Axis) -> list[dict[Run, int]]:
    """For all pairs of taps along one dimension, the runs that add up to theirs."""
    return [_terms(axis, k, m) for k in range(axis.kernel) for m in range(axis.kernel)]


def _runs(terms: list[dict[Run, int]]) -> list[Run]:
    """All of them; a shift forwards comes before the one backwards: what is taken lies behind."""
    return sorted({run for pair in terms for run in pair}, key=lambda r: (-r.shift, r))


def _terms(axis: Axis, k: int, m: int) -> dict[Run, int]:
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


def add_shifted(
    gram: Gram, image: Float[Tensor, "batch channels *space"], axes: tuple[Axis, ...]
) -> None:
    """Add Σ patch patchᵀ, for windows with stride one."""
    how, total, group = plan(axes), gram.total, len(gram.total)
    if not how.boxes or not image.numel():
        return
    channels = image.shape[1] // group
    products = total.new_zeros(len(how.boxes), group, channels, channels)
    numel = max(chunk_numel(image.device), ROWS * channels * image.shape[1])
    for c in how.correlations:  # what lies at the border is little, and all data are taken at once
        datum = image.shape[1] * prod(length for _, length in c.reach)
        for part in image.split(max(1, numel // datum)):
            both = _cut(part, c.reach).to(total.dtype)
            first, second = _cut(both, c.first), _cut(both, c.second)
            found = correlation(first, second, c.kernel, [a.dilation for a in axes], group)
            for box, place in zip(c.boxes, c.places, strict=True):
                products[box].add_(found[place])
    for k, other in enumerate(how.turned):
        if other < k:
            products[k] = products[other].mT
    _scatter(gram, products, weights(axes).to(total))


def _cut(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """A part of the last axes, with zeros where it leaves them.

    In the order in which convolutions of the CPU are fastest.
    """
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    inside: list[Any] = [...]
    for axis, (start, length) in enumerate(spans, start=2):
        low, high = max(start, 0), min(start + length, x.shape[axis])
        x = x.narrow(axis, low, high - low)
        inside.append(slice(low - start, high - start))
    shape = (*x.shape[:2], *(length for _, length in spans))
    if x.shape == shape:
        return x.contiguous(memory_format=order)
    room = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order).zero_()
    room[tuple(inside)] = x
    return room


def _scatter(
    gram: Gram,
    products: Float[Tensor, "boxes group c c"],
    taken: Float[Tensor, "pairs boxes"],
) -> None:
    """Add the products to the pairs of taps they are part of, a strip of channels at a time."""
    total, (group, channels) = gram.total, products.shape[1:3]
    kernel = total.shape[-1] // channels
    step = max(1, chunk_numel(total.device) // (kernel**2 * group * channels))
    beta = gram.beta(min(step, channels) * kernel)
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        part = products[:, :, start:stop, :stop]
        blocks = (taken @ part.flatten(1)).view(kernel, kernel, *part.shape[1:])
        strip = total[:, start * kernel : stop * kernel, : stop * kernel]
        add_part(strip, rearrange(blocks, "k m g c e -> g (c k) (e m)"), beta)


def shifted_cost(
    axes: tuple[Axis, ...], batch: int, group: int, channels: int, dtype: torch.dtype
) -> float:
    """The time of `add_shifted`, in multiply-adds of one large product."""
    each = (1 if has_wide_vectors() else NARROW) * -(-channels // VECTOR) * VECTOR
    moved, found = MOVED if dtype == torch.float32 else MOVED_WITHOUT_KERNEL, 0.0
    for c in plan(axes).correlations:
        numel = batch * group * channels * prod(length for _, length in c.first)
        found += CONVOLUTION + numel * (each * prod(c.kernel) + moved)
    return found + group * (channels * prod(a.kernel for a in axes)) ** 2 * SCATTERED
