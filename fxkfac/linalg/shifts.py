"""Image -> Σ patch patchᵀ without patches, where windows lie at every position (stride one).

The entry of two taps k, l and two channels is Σ_u x[u] x[u + δ] with δ = (l − k) · dilation: away
from the border it depends on the difference of the taps alone, so that a 3 × 3 kernel has 13
products of the image with itself, moved, in place of 81 / 2. Where the windows leave part of the
image out, the sum runs over an interval; it is the sum over everything minus what lies before and
behind, and these are thin. All this happens along each dimension by itself.

    Σ_u over [low, high)  =  Σ_u over all  −  Σ_u before low  −  Σ_u from high on
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.gram import CALL, COPY, READ, chunk_numel
from fxkfac.linalg.windows import Axis

if TYPE_CHECKING:
    from jaxtyping import Float


ROWS = 4  # times as many rows as channels at least, or adding up costs as much as multiplying


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
class Plan:
    """Which products are taken, and how the patches' products are made of them.

    Attributes:
        boxes: One product of channels with channels for each.
        turned: For every box, the number of the one with its factors in the other order.
        tables: For every dimension, what a pair of taps takes of every run: 1, −1 or 0.
        sizes: Of the image.
        gaps: Zeros behind every dimension that keep moved images apart.
    """

    boxes: tuple[Box, ...]
    turned: tuple[int, ...]
    tables: tuple[Float[Tensor, "kernel kernel runs"], ...]
    sizes: tuple[int, ...]
    gaps: tuple[int, ...]

    @property
    def taken(self) -> list[int]:
        """The boxes that are multiplied: of two that are each other's transpose, the first."""
        return [k for k, other in enumerate(self.turned) if k <= other]

    @property
    def spaces(self) -> list[int]:
        """The sizes with the gaps."""
        return [size + gap for size, gap in zip(self.sizes, self.gaps, strict=True)]

    @cached_property
    def weights(self) -> Float[Tensor, "pairs boxes"]:
        """What a pair of taps takes of every box."""
        joined = torch.ones(1, 1, 1)
        for table in self.tables:
            joined = torch.einsum("kmr,lns->klmnrs", joined, table)
            joined = rearrange(joined, "k l m n r s -> (k l) (m n) (r s)")
        return joined.flatten(0, 1)

    def offset(self, box: Box) -> int:
        """How far the second factor lies behind the first, in an image with gaps."""
        return reduce(lambda n, at: n * at[0] + at[1].shift, zip(self.spaces, box, strict=True), 0)

    def costs(self, box: Box, channels: int) -> tuple[float, float]:
        """Of one image: from all positions with gaps, if all are summed; from copies of the box."""
        whole_box = all(r == whole(r.shift, n) for r, n in zip(box, self.sizes, strict=True))
        volume = prod(r.length for r in box)
        flat = prod(self.spaces) * channels * (channels + READ)
        copied = volume * channels * (channels + READ + 2 * COPY)
        return flat if whole_box else inf, copied


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
    gaps = tuple(max((r.shift for r in rs), default=0) for rs in runs)
    return Plan(boxes, turned, tables, tuple(a.size for a in axes), gaps)


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
    total: Float[Tensor, "group d d"],
    image: Float[Tensor, "batch channels *space"],
    axes: tuple[Axis, ...],
) -> None:
    """Add Σ patch patchᵀ to the lower triangle of a total, for windows with stride one."""
    how, group = plan(axes), len(total)
    if not how.boxes or not image.numel():
        return
    channels = image.shape[1] // group
    products = total.new_zeros(len(how.boxes), group, channels, channels)
    numel = max(chunk_numel(image.device), ROWS * channels * image.shape[1])
    for part in image.split(max(1, numel // image[0].numel())):
        x = rearrange(part.to(total.dtype), "n (g c) ... -> g c n ...", g=group)
        _add_products(products, x, how, ways(axes, channels))
    for k, other in enumerate(how.turned):
        if other < k:
            products[k] = products[other].mT
    _scatter(total, products, how.weights.to(total))


@lru_cache(maxsize=256)
def ways(axes: tuple[Axis, ...], channels: int) -> dict[int, int | None]:
    """How the boxes are multiplied: a distance in the image with gaps, `None` where by copies."""
    how, chosen = plan(axes), {}
    for k in how.taken:
        gaps, copied = how.costs(how.boxes[k], channels)
        chosen[k] = how.offset(how.boxes[k]) if gaps <= copied else None
    return chosen


def _add_products(
    products: Float[Tensor, "boxes group c c"],
    x: Float[Tensor, "group c batch *space"],
    how: Plan,
    ways: dict[int, int | None],
) -> None:
    """Add what some of the data give."""
    flat = x if set(ways.values()) == {None} else _with_gaps(x, how)
    for k, far in ways.items():
        if far is None:
            first, second = _copies(x, how.boxes[k])
        else:
            first, second = flat[..., : flat.shape[-1] - far], flat[..., far:]
        if len(x) == 1:
            products[k, 0].addmm_(first[0], second[0].mT)
        else:
            products[k].baddbmm_(first, second.mT)


def _with_gaps(
    x: Float[Tensor, "group c batch *space"], how: Plan
) -> Float[Tensor, "group c positions"]:
    """All images one after another with zeros between lines: a shift is a distance."""
    buffer = x.new_zeros(*x.shape[:3], *how.spaces)
    _cut(buffer, [(0, size) for size in how.sizes]).copy_(x)
    return buffer.flatten(2)


def _copies(x: Float[Tensor, "group c batch *space"], box: Box) -> tuple[Tensor, Tensor]:
    """The two factors of a product, (group, c, positions) each."""
    first = _cut(x, [(r.low, r.length) for r in box]).flatten(2)
    if not any(r.shift for r in box):
        return first, first
    return first, _cut(x, [(r.low + r.shift, r.length) for r in box]).flatten(2)


def _cut(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """A part of the last axes, a start and a length for each."""
    for k, (start, length) in enumerate(spans):
        x = x.narrow(k - len(spans), start, length)
    return x


def _scatter(
    total: Float[Tensor, "group d d"],
    products: Float[Tensor, "boxes group c c"],
    weights: Float[Tensor, "pairs boxes"],
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
        strip += rearrange(blocks, "k m g c e -> g (c k) (e m)")


def shifted_cost(axes: tuple[Axis, ...], batch: int, group: int, channels: int) -> float:
    """The time of `add_shifted`, in multiply-adds."""
    how = plan(axes)
    taken = sum(CALL + batch * group * min(how.costs(how.boxes[k], channels)) for k in how.taken)
    d = channels * prod(a.kernel for a in axes)
    return taken + group * d**2 * (len(how.boxes) + 2 * COPY)
