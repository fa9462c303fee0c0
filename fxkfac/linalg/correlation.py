"""Σ_u x[u] y[u + δ]ᵀ, channels times channels over positions: a convolution's weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

FEWEST = 64  # channels: fewer take longer than matrix products,
BLOCK = 400  # and more in one call take longer than several calls;
MULTIPLE = 16  # those of one cache line are best kept together
LEAST = 2**17  # numbers: with fewer of them, what a call takes in any case counts
COPIED = 2**20  # numbers that are copied at once
IMAGE = 32  # rows that are taken for the positions of one image


def correlation(
    x: Float[Tensor, "batch channels_x *space"],
    y: Float[Tensor, "batch channels_y *wider"],
    kernel: Sequence[int],
    dilation: Sequence[int],
    group: int = 1,
) -> Float[Tensor, "shifts group c e"]:
    """Σ over data and positions u of x[u] y[u + δ]ᵀ, for every shift δ within a kernel.

    Args:
        x: One factor.
        y: The other one, longer by dilation · (kernel − 1) along each dimension.
        kernel: The number of shifts along each dimension.
        dilation: What lies between two of them.
        group: In how many groups the channels fall.
    """
    shape = (x.shape[1], y.shape[1] // group, *kernel)
    weight = WEIGHT_GRADIENTS[len(kernel)](y, shape, x, 1, 0, dilation, group)
    return rearrange(weight.flatten(2), "(g c) e k -> k g c e", g=group)


def is_faster(x: Tensor, channels: int) -> bool:
    """Whether convolutions outrun matrix products, for numbers of so many channels."""
    if channels < FEWEST or x.numel() < LEAST:
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    mkldnn = torch.backends.mkldnn
    return blas_is_behind() and mkldnn.is_available() and bool(mkldnn.enabled)


@cache
def blas_is_behind() -> bool:
    """Whether this is a CPU for which convolutions have kernels, and MKL has none.

    MKL uses AVX-512 on Intel's own alone: on an AMD that has it, convolutions take half of the
    time of matrix products; everywhere else, without AVX-512, two to four times as long.
    """
    names = Path("/proc/cpuinfo")
    return has_wide_vectors() and names.exists() and "AuthenticAMD" in names.read_text()


@cache
def has_wide_vectors() -> bool:
    """Whether kernels of the CPU are chosen for AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def add_part(total: Tensor, part: Tensor, beta: float) -> None:
    """total = beta · total + part, with beta zero or one; what it held is not read for zero."""
    if beta:
        total.add_(part)
    else:
        total.copy_(part)


def add_by_channels(
    total: Float[Tensor, "group d d"], image: Float[Tensor, "batch channels *space"], beta: float
) -> None:
    """total = beta · total + Σ x xᵀ over data and positions, its lower triangle at least."""
    group, ones = len(total), [1] * (image.ndim - 2)
    if group > 1:
        add_part(total, correlation(image, image, ones, ones, group)[0], beta)
        return
    channels = image.shape[1]
    width = channel_block(channels, group)
    # No more than the total has, but enough that adding to it does not count.
    size = max(1, max(COPIED, 2 * channels**2) // image[0].numel())
    for some in image.split(size if width < channels else len(image)):
        parts = [_dense(part, like=some) for part in some.split(width, dim=1)]
        for i, part in enumerate(parts):
            for j, other in enumerate(parts[: i + 1]):
                rows, columns = (slice(k * width, (k + 1) * width) for k in (i, j))
                found = correlation(part, other, ones, ones)[0, 0]
                add_part(total[0, rows, columns], found, beta)
        beta = 1.0


def channel_block(channels: int, group: int = 1) -> int:
    """How many channels `add_by_channels` takes at once; blocks on the diagonal come whole."""
    if group > 1:
        return channels // group
    blocks = -(-channels // BLOCK)
    return min(channels, -(-channels // (blocks * MULTIPLE)) * MULTIPLE)


def _dense(part: Tensor, like: Tensor) -> Tensor:
    """In the order of axes that it is cut out of."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()


def as_images(rows: Float[Tensor, "rows d"]) -> Float[Tensor, "images d positions 1"]:
    """Rows as positions of images with channels last, which is how they lie."""
    return rearrange(rows, "(n p) d -> n d p 1", p=IMAGE)
