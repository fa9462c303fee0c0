"""Image -> Σ patch patchᵀ without patches and without a kernel of our own, for stride one.

The products of boxes (see `boxes`) that differ by shifts alone are the weight gradient of one
convolution, which PyTorch has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.boxes import KNOWN, Box, Run, Sizes, boxes_of, whole
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
MOVED_IN_DOUBLE = 2500  # in double precision, where it copies patches itself
SCATTERED = 450  # for every number of the sum

Span = tuple[int, int]  # start and length along a dimension


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


@lru_cache(maxsize=KNOWN)
def correlations(axes: tuple[Axis, ...]) -> tuple[Correlation, ...]:
    """How the boxes are computed that are taken, for windows with stride one."""
    return tuple(_correlations(boxes_of(axes).taken, axes))


@made_once
def weights(axes: tuple[Axis, ...]) -> Float[Tensor, "pairs boxes"]:
    """What a pair of taps takes of every box: 1, −1 or 0."""
    how = boxes_of(axes)
    table = torch.zeros(len(how.terms), len(how.boxes), device="cpu")
    for pair, terms in enumerate(how.terms):
        for box, sign in terms:
            table[pair, box] = sign
    return table


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


def add_shifted(
    gram: Gram, image: Float[Tensor, "batch channels *space"], axes: tuple[Axis, ...]
) -> None:
    """Add Σ patch patchᵀ, for windows with stride one."""
    how, total, group = boxes_of(axes), gram.total, len(gram.total)
    if not how.boxes or not image.numel():
        return
    channels = image.shape[1] // group
    products = total.new_zeros(len(how.boxes), group, channels, channels)
    numel = max(chunk_numel(image.device), ROWS * channels * image.shape[1])
    for c in correlations(
        axes
    ):  # what lies at the border is little, and all data are taken at once
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


def shifted_cost(axes: tuple[Axis, ...], sizes: Sizes, dtype: torch.dtype) -> float:
    """The time of `add_shifted`, in multiply-adds of one large product."""
    batch, group, channels = sizes
    each = (1 if has_wide_vectors() else NARROW) * -(-channels // VECTOR) * VECTOR
    moved, found = MOVED if dtype == torch.float32 else MOVED_IN_DOUBLE, 0.0
    for c in correlations(axes):
        numel = batch * group * channels * prod(length for _, length in c.first)
        found += CONVOLUTION + numel * (each * prod(c.kernel) + moved)
    return found + group * (channels * prod(a.kernel for a in axes)) ** 2 * SCATTERED
