"""What a convolution's kernel sees: its windows on an image, one spatial dimension at a time.

Along one dimension the tap k of the window at place j lies on u = j · stride + k · dilation −
before; outside of the image there are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


KNOWN = 1024  # windows on images of one size each, which are the same at every batch


@dataclass(frozen=True)
class Axis:
    """The windows along one spatial dimension of an image of known size."""

    size: int
    kernel: int
    stride: int
    before: int
    dilation: int
    places: int

    @property
    def after(self) -> int:
        """What the last window lacks behind the image; negative where it ends inside."""
        last = (self.places - 1) * self.stride + (self.kernel - 1) * self.dilation
        return last - self.before - self.size + 1

    def inside(self) -> slice:
        """The positions in the image on which a kernel of length one lies."""
        first = -(-self.before // self.stride) * self.stride - self.before
        stop = (self.places - 1) * self.stride - self.before + 1
        return slice(first, max(first, min(self.size, stop)), self.stride)


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution with one to three spatial dimensions.

    Attributes:
        kernel: Its lengths.
        padding: Zeros before and after the image.
        groups: Into which the channels fall.
        places: How many there are along every dimension; `None` for as many as fit.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    places: tuple[int, ...] | None = None

    @staticmethod
    def of(numbers: Sequence[int], dimensions: int, groups: int) -> Windows:
        """What `numbers` has made of."""
        parts = [tuple(numbers[k : k + dimensions]) for k in range(0, len(numbers), dimensions)]
        kernel, stride, before, after, dilation, *places = parts
        padding = tuple(zip(before, after, strict=True))
        return Windows(kernel, stride, padding, dilation, groups, places[0] if places else None)

    def numbers(self) -> list[int]:
        """All but the groups, one dimension after the other for each."""
        before, after = zip(*self.padding, strict=True)
        parts = (self.kernel, self.stride, before, after, self.dilation, self.places or ())
        return [number for part in parts for number in part]

    def along(self, image: Float[Tensor, "batch channels *space"]) -> tuple[Axis, ...]:
        """The windows along every dimension of an image."""
        return _along(self, image.shape[2:])

    def axis(self, k: int, size: int) -> Axis:
        """Those along one dimension, of which the image has so many positions."""
        (before, after), dilation, stride = self.padding[k], self.dilation[k], self.stride[k]
        room = before + size + after - dilation * (self.kernel[k] - 1) - 1
        places = max(0, room // stride + 1) if self.places is None else self.places[k]
        return Axis(size, self.kernel[k], stride, before, dilation, places)


@lru_cache(maxsize=KNOWN)
def _along(windows: Windows, space: torch.Size) -> tuple[Axis, ...]:
    return tuple(windows.axis(k, size) for k, size in enumerate(space))


def subsampled(
    image: Float[Tensor, "batch channels *space"], axes: tuple[Axis, ...]
) -> tuple[Float[Tensor, "batch channels *fewer"], tuple[Axis, ...]]:
    """Only what the windows see where the kernel has length one: a view without strides there."""
    seen, dense = _seen(axes)
    return (image if seen is None else image[seen]), dense


@lru_cache(maxsize=KNOWN)
def _seen(axes: tuple[Axis, ...]) -> tuple[tuple[slice, ...] | None, tuple[Axis, ...]]:
    """What they see of an image, `None` for all of it; and where they lie in that."""
    seen, dense = [slice(None)] * 2, []
    for axis in axes:
        inside = axis.inside() if axis.kernel == 1 else slice(0, axis.size, 1)
        size = len(range(axis.size)[inside])
        seen.append(inside)
        dense.append(Axis(size, 1, 1, 0, 1, size) if axis.kernel == 1 else axis)
    whole = all(range(a.size)[s] == range(a.size) for a, s in zip(axes, seen[2:], strict=True))
    return (None if whole else tuple(seen)), tuple(dense)


def patches(
    image: Float[Tensor, "batch channels *space"], axes: tuple[Axis, ...]
) -> Float[Tensor, "batch channels *places_kernel"]:
    """All windows, as a view into the padded image: first all places, then all taps."""
    padding = [(a.before, max(0, a.after)) for a in axes]
    x = F.pad(image, [p for pair in reversed(padding) for p in pair])
    for a in axes:
        # unfold puts its kernel axis last: the next spatial axis is always as far from the end.
        x = x.unfold(-len(axes), a.dilation * (a.kernel - 1) + 1, a.stride)[..., :: a.dilation]
    for k, a in enumerate(axes):
        x = x.narrow(2 + k, 0, a.places)
    return x


def patch_sums(
    image: Float[Tensor, "batch channels *space"], windows: Windows
) -> Float[Tensor, "batch group channel_kernel"]:
    """Σ_places of the patches of every datum: for each tap, the sum of what it lies on.

    Along each dimension this is the product with a matrix of zeros and ones.
    """
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    for axis in reversed(windows.along(image)):
        x = (x @ _lies_on(axis, x).mT).movedim(-1, 2)
    return rearrange(x.flatten(2), "n (g c) k -> n g (c k)", g=windows.groups)


def _lies_on(axis: Axis, like: Tensor) -> Float[Tensor, "kernel size"]:
    """Whether a tap lies on a position at one of the places."""
    u = torch.arange(axis.size, device=like.device)
    k = torch.arange(axis.kernel, device=like.device).unsqueeze(-1)
    moved = u + axis.before - k * axis.dilation  # = j · stride
    inside = (moved >= 0) & (moved < axis.places * axis.stride)
    return (inside & (moved % axis.stride == 0)).to(like.dtype)
