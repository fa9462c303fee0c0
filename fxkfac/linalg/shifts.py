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
from functools import cached_property, lru_cache, reduce
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.correlation import add_part, correlation, has_wide_vectors
from fxkfac.linalg.gram import CALL, COPY, READ, Gram, chunk_numel
from fxkfac.linalg.windows import Axis

if TYPE_CHECKING:
    from jaxtyping import Float


ROWS = 4  # times as many rows as channels at least, or adding up costs as much as multiplying
VECTOR = 8  # channels: fewer take as long
NARROW = 2  # times as long as a product's a convolution's multiply-add takes without AVX-512


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


@dataclass(frozen=True)
class Correlation:
    """Boxes that differ by shifts along whole dimensions alone: the weight gradient of one conv.

    Attributes:
        boxes: Their numbers.
        places: For each one, where its product is in the flat kernel.
        first: What the first factor has of the image, (start, length) along each dimension.
        second: The second one's, of the image with margins.
        kernel: The number of shifts along each dimension.
    """

    boxes: tuple[int, ...]
    places: tuple[int, ...]
    first: tuple[tuple[int, int], ...]
    second: tuple[tuple[int, int], ...]
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which products are taken, and how the patches' products are made of them.

    Attributes:
        boxes: One product of channels with channels for each.
        turned: For every box, the number of the one with its factors in the other order.
        tables: For every dimension, what a pair of taps takes of every run: 1, −1 or 0.
        margins: Zeros before and behind the image along each dimension.
        correlations: How the boxes are computed of which no other one is the transpose.
    """

    boxes: tuple[Box, ...]
    turned: tuple[int, ...]
    tables: tuple[Float[Tensor, "kernel kernel runs"], ...]
    margins: tuple[tuple[int, int], ...]
    correlations: tuple[Correlation, ...]

    @cached_property
    def weights(self) -> Float[Tensor, "pairs boxes"]:
        """What a pair of taps takes of every box."""
        joined = torch.ones(1, 1, 1, device="cpu")
        for table in self.tables:
            joined = torch.einsum("kmr,lns->klmnrs", joined, table)
            joined = rearrange(joined, "k l m n r s -> (k l) (m n) (r s)")
        return joined.flatten(0, 1)


@lru_cache(maxsize=256)  # the same for every vector and every batch
def plan(axes: tuple[Axis, ...]) -> Plan:
    """The products for windows with stride one."""
    terms = [_terms_of_pairs(axis) for axis in axes]
    # A shift forwards comes before the one backwards, so that what is taken lies behind.
    runs = [sorted({r for t in along for r in t}, key=lambda r: (-r.shift, r)) for along in terms]
    boxes = tuple(product(*runs))
    number = {box: k for k, box in enumerate(boxes)}
    turned = tuple(number[tuple(r.turned() for r in box)] for box in boxes)
    tables = tuple(
        torch.tensor([[float(t.get(r, 0)) for r in rs] for t in along]).view(a.kernel, a.kernel, -1)
        for along, rs, a in zip(terms, runs, axes, strict=True)
    )
    taken = {k: boxes[k] for k, other in enumerate(turned) if k <= other}
    margins = tuple(
        (max(0, -min(r.shift for r in rs)), max(0, max(r.shift for r in rs))) if rs else (0, 0)
        for rs in runs
    )
    return Plan(boxes, turned, tables, margins, tuple(_correlations(taken, axes, margins)))


def _correlations(
    taken: Mapping[int, Box], axes: tuple[Axis, ...], margins: tuple[tuple[int, int], ...]
) -> Iterator[Correlation]:
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
        second = [
            (margin + low + start, length + (size - 1) * axis.dilation)
            for (margin, _), (low, length), start, size, axis in zip(
                margins, spans, starts, kernel, axes, strict=True
            )
        ]
        yield Correlation(tuple(numbers), tuple(places), tuple(spans), tuple(second), tuple(kernel))


def _is_whole(run: Run, axis: Axis) -> bool:
    return run == whole(run.shift, axis.size)


def _terms_of_pairs(axis: Axis) -> list[dict[Run, int]]:
    """For all pairs of taps along one dimension, the runs that add up to theirs."""
    return [_terms(axis, k, m) for k in range(axis.kernel) for m in range(axis.kernel)]


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
    room: Tensor | None = None  # what lies around the image stays zero
    for part in image.split(max(1, numel // image[0].numel())):
        x = _channels_last(part.to(total.dtype))
        if room is None or len(room) != len(x):
            room = F.pad(x, [m for pair in reversed(how.margins) for m in pair])
        else:
            inside = ((m, n) for (m, _), n in zip(how.margins, x.shape[2:], strict=True))
            _cut(room, tuple(inside)).copy_(x)
        for c in how.correlations:
            first, second = _cut(x, c.first), _cut(room, c.second)
            found = correlation(first, second, c.kernel, [a.dilation for a in axes], group)
            products[list(c.boxes)] += found[list(c.places)]
    for k, other in enumerate(how.turned):
        if other < k:
            products[k] = products[other].mT
    _scatter(total, products, how.weights.to(total), gram.beta())


def _channels_last(x: Tensor) -> Tensor:
    """In the order in which convolutions of the CPU are fastest."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _cut(x: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """A part of the last axes, a start and a length for each."""
    for k, (start, length) in enumerate(spans):
        x = x.narrow(k - len(spans), start, length)
    return x


def _scatter(
    total: Float[Tensor, "group d d"],
    products: Float[Tensor, "boxes group c c"],
    weights: Float[Tensor, "pairs boxes"],
    beta: float,
) -> None:
    """Add the products to the pairs of taps they are part of, a strip of channels at a time."""
    group, channels = products.shape[1:3]
    kernel = total.shape[-1] // channels
    step = max(1, chunk_numel(total.device) // (kernel**2 * group * channels))
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        part = products[:, :, start:stop, :stop]
        blocks = (weights @ part.flatten(1)).view(kernel, kernel, *part.shape[1:])
        strip = total[:, start * kernel : stop * kernel, : stop * kernel]
        add_part(strip, rearrange(blocks, "k m g c e -> g (c k) (e m)"), beta)


def shifted_cost(axes: tuple[Axis, ...], batch: int, group: int, channels: int) -> float:
    """The time of `add_shifted`, in multiply-adds."""
    how, boxes = plan(axes), 0.0
    each = (1 if has_wide_vectors() else NARROW) * -(-channels // VECTOR) * VECTOR
    for c in how.correlations:
        numel = batch * group * channels * prod(length for _, length in c.first)
        boxes += CALL + numel * (each * prod(c.kernel) + READ + COPY)
    moved = len(how.boxes) * group * channels**2 * COPY
    d = channels * prod(a.kernel for a in axes)
    return boxes + moved + group * d**2 * (len(how.boxes) + 2 * COPY)
