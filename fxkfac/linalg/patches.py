"""Image -> Σ patch patchᵀ of a convolution's windows, without ever holding all patches.

Columns are ordered as the weight's: channels, then the kernel's axes.
"""

from __future__ import annotations

from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.boxes import KNOWN, Sizes, has_few_boxes
from fxkfac.linalg.correlation import add_by_channels, channel_block, is_faster
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.moved import add_moved, moved_cost
from fxkfac.linalg.products import add_gram, add_rows, chunk_numel, triangle
from fxkfac.linalg.shifts import add_shifted, shifted_cost
from fxkfac.linalg.tiles import kernel_for
from fxkfac.linalg.windows import Axis, Windows, patches, subsampled

if TYPE_CHECKING:
    from jaxtyping import Float

COPY = 16  # multiply-adds take as long as to copy a number of a patch
SLOWER = 1.5  # times as long as in a kernel one takes in strips of patches
DIGITS = 0.6  # times as long one takes in the kernel by digits


def add_patch_gram(
    gram: Gram, image: Float[Tensor, "batch channels *space"], windows: Windows
) -> None:
    """Add Σ patch patchᵀ, in place.

    Args:
        gram: Where to; its d is the number of a group's channels times the kernel's taps.
        image: What the kernel moves over, of any strides.
        windows: Where the kernel lies.
    """
    group, (batch, channels) = windows.groups, image.shape[:2]
    image, axes = subsampled(image, windows.along(image))
    if all(a.kernel == 1 for a in axes):
        _add_positions(gram, image, group)
        return
    if not batch or any(a.places == 0 for a in axes):
        return
    rows, sizes = batch * prod(a.places for a in axes), (batch, group, channels // group)
    if kernel := kernel_for(gram.total, image, rows, copied=True):
        digits = kernel.takes_digits(rows, gram.total.shape[-1])
        if moving_pays(axes, sizes, digits):
            add_moved(gram, kernel, image, axes)
        else:
            places, taps = _names(axes)
            of_groups = f"n (g c) {places} {taps} -> g n {places} c {taps}"
            x = rearrange(patches(image, axes), of_groups, g=group)
            gram.add(partial(kernel.add, x=x, columns=1 + len(axes)))
    elif image.is_cpu and shifts_pay(axes, sizes, image.dtype):
        add_shifted(gram, image, axes)
    else:
        add_patches(gram, image, axes)


def _add_positions(gram: Gram, image: Tensor, group: int) -> None:
    """Of a kernel with one tap: a row for each position."""
    d = image.shape[1] // group
    rows = image.numel() // image.shape[1]
    if rows and is_faster(image, d) and not kernel_for(gram.total, image, rows):
        add_by_channels(gram.total, image, gram.beta(channel_block(image.shape[1], group)))
    else:
        add_gram(gram, _positions(image, group))


def _names(axes: tuple[Axis, ...]) -> tuple[str, str]:
    """What patches have after data and channels, for einops."""
    places, taps = (" ".join(f"{a}{k}" for k in range(len(axes))) for a in "pk")
    return places, taps


def _positions(image: Tensor, group: int) -> Float[Tensor, "group batch positions channels"]:
    """The channels at each position: of one group as quick as it can be, as nearly all are."""
    if group == 1:
        return image.flatten(2).mT.unsqueeze(0)
    return rearrange(image, "n (g c) ... -> g n (...) c", g=group)


@lru_cache(maxsize=KNOWN)
def moving_pays(axes: tuple[Axis, ...], sizes: Sizes, by_digits: bool) -> bool:
    """Whether the kernel for images takes less time than one for rows takes for patches.

    Args:
        axes: Where windows lie.
        sizes: Of the image.
        by_digits: Whether that is the one by digits.
    """
    return has_few_boxes(axes) and moved_cost(axes, sizes) < patch_cost(axes, sizes, by_digits)


@lru_cache(maxsize=KNOWN)
def shifts_pay(axes: tuple[Axis, ...], sizes: Sizes, dtype: torch.dtype) -> bool:
    """Whether convolutions of the moved image are cheaper than patches, on a CPU without kernels.

    A GPU takes two to ten times as long for them, but for 256 channels and more.

    Args:
        axes: Where windows lie.
        sizes: Of the image.
        dtype: Of the image.
    """
    if not has_few_boxes(axes):
        return False
    numel, d = _patch_numbers(axes, sizes)
    return shifted_cost(axes, sizes, dtype) < numel * SLOWER * (triangle(d) * d + COPY)


def patch_cost(axes: tuple[Axis, ...], sizes: Sizes, by_digits: bool) -> float:
    """The time that a kernel for rows takes for patches, in multiply-adds."""
    numel, d = _patch_numbers(axes, sizes)
    return numel * ((DIGITS if by_digits else 1.0) * d / 2 + COPY)


def _patch_numbers(axes: tuple[Axis, ...], sizes: Sizes) -> tuple[int, int]:
    """How many numbers all patches have, and one of a group."""
    batch, group, channels = sizes
    d = channels * prod(a.kernel for a in axes)
    return batch * prod(a.places for a in axes) * group * d, d


def add_patches(
    gram: Gram, image: Float[Tensor, "batch channels *space"], axes: tuple[Axis, ...]
) -> None:
    """Add Σ patch patchᵀ, from some patches at a time."""
    group, d = gram.total.shape[:2]
    places, taps = _names(axes)
    # Positions last, so that lines of the image are copied whole.
    positions_last = f"n (g c) {places} {taps} -> g (c {taps}) (n {places})"
    line = group * d * prod(a.places for a in axes[1:])  # numbers for one place in the first axis
    lines = max(1, max(chunk_numel(image.device), d**2) // line)
    for part in image.split(max(1, lines // axes[0].places)):
        for some in patches(part, axes).split(lines, dim=2):
            add_rows(gram, rearrange(some.to(gram.total.dtype), positions_last, g=group).mT)
