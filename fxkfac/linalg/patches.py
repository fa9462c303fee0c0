"""Image -> Σ patch patchᵀ of a convolution's windows, without ever holding all patches.

Columns are ordered as the weight's: channels, then the kernel's axes.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.correlation import add_by_channels, channel_block, is_faster
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.products import add_gram, add_rows, chunk_numel, triangle
from fxkfac.linalg.shifts import add_shifted, shifted_cost
from fxkfac.linalg.tiles import kernel_for
from fxkfac.linalg.windows import Axis, Windows, patches, subsampled

if TYPE_CHECKING:
    from jaxtyping import Float

COPY = 16  # multiply-adds take as long as to copy a number of a patch
SLOWER = 1.5  # times as long as in a kernel one takes in strips of patches


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
    rows, d = batch * prod(a.places for a in axes), gram.total.shape[-1]
    kernel = kernel_for(gram.total, image, rows, copied=True)
    sizes = batch, group, channels // group
    digits = kernel is not None and kernel.takes_digits(rows, d)
    if image.is_cpu and not digits and shifts_pay(axes, sizes, image.dtype, kernel is not None):
        add_shifted(gram, image, axes)
    elif kernel:
        places, taps = _names(axes)
        of_groups = f"n (g c) {places} {taps} -> g n {places} c {taps}"
        windowed = rearrange(patches(image, axes), of_groups, g=group)
        gram.add(kernel, windowed, columns=1 + len(axes))
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


@lru_cache(maxsize=256)  # the same for every vector and every batch
def shifts_pay(
    axes: tuple[Axis, ...], sizes: tuple[int, int, int], dtype: torch.dtype, has_kernel: bool
) -> bool:
    """Whether products of the moved image are cheaper than patches, on a CPU.

    A GPU takes two to ten times as long for them, but for 256 channels and more.

    Args:
        axes: Where windows lie.
        sizes: Numbers of data, of groups, and of channels in one.
        dtype: Of the image.
        has_kernel: Whether patches go to a kernel, by vectors.
    """
    if any(a.stride > 1 for a in axes):
        return False
    batch, group, channels = sizes
    d = channels * prod(a.kernel for a in axes)
    numel = batch * prod(a.places for a in axes) * group * d
    each = d / 2 + COPY if has_kernel else SLOWER * (triangle(d) * d + COPY)
    return shifted_cost(axes, *sizes, dtype) < numel * each


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
