"""Convolutions as layers on patches, and back: by going over places and offsets one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.tape import Tape

Each = int | tuple[int, ...]  # one number for all axes, or one for each


def conv_patches(
    x: Tensor, weight: Tensor, stride: Each = 1, dilation: Each = 1, groups: int = 1
) -> tuple[Tensor, list[int]]:
    """x (n, c, *space), padded -> (g, n, places, c/g · kernel), and the places along each axis."""
    kernel = weight.shape[2:]
    steps, spread = each(stride, kernel), each(dilation, kernel)
    places = [
        range(0, size - d * (k - 1), s)
        for size, k, s, d in zip(x.shape[2:], kernel, steps, spread, strict=True)
    ]
    rows = []
    for corner in itertools.product(*places):
        seen = [x[(..., *at)] for at in offsets(corner, kernel, spread)]
        rows.append(torch.stack(seen, -1))  # (n, c, kernel)
    patches = torch.stack(rows, 1).unflatten(2, (groups, -1)).flatten(3)
    return patches.permute(2, 0, 1, 3), [len(p) for p in places]


def offsets(
    corner: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Where the entries of a kernel are that lies at a corner, in the kernel's order."""
    for at in itertools.product(*map(range, kernel)):
        yield tuple(a + o * d for a, o, d in zip(corner, at, dilation, strict=True))


def each(value: Each, like: Sequence[int]) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * len(like) if isinstance(value, int) else value


def pad(x: Tensor, *pairs: tuple[int, int], mode: str = "constant") -> Tensor:
    """Pad an image by (before, after) for each axis of its space."""
    return F.pad(x, [p for pair in reversed(pairs) for p in pair], mode=mode)


def conv_weight(W: Tensor, groups: int = 1) -> Tensor:
    """(out, c/g, *kernel) -> (g, c/g · kernel, out/g)."""
    return W.unflatten(0, (groups, -1)).flatten(2).mT


def image(y: Tensor, places: Sequence[int]) -> Tensor:
    """(g, n, places, o) -> (n, g · o, *places)."""
    return y.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, places)


def conv(
    tape: Tape, name: str, x: Tensor, stride: Each = 1, dilation: Each = 1, groups: int = 1
) -> Tensor:
    """The convolution `name` of a padded image."""
    W, b = tape.params[f"{name}.weight"], tape.params.get(f"{name}.bias")
    rows, places = conv_patches(x, W, stride, dilation, groups)
    bias = None if b is None else b.view(groups, -1)
    return image(tape.layer(f"{name}.weight", rows, conv_weight(W, groups), bias), places)


def transposed_conv(
    tape: Tape,
    weight: str,
    x: Tensor,
    stride: Each = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: Each = 1,
    groups: int = 1,
) -> Tensor:
    """A transposed convolution without its bias: the *output* is patches, which are added up.

    The weight is stored as (c_in, c_out/g, *kernel); in are its channels c_in/g, out is
    c_out/g · kernel.
    """
    W = tape.params[weight]
    rows = x.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)  # (g, n, places, c_in/g)
    y = tape.layer(weight, rows, W.unflatten(0, (groups, -1)).flatten(2))
    patches = y.permute(1, 0, 3, 2).unflatten(2, (W.shape[1], -1)).flatten(1, 2)
    return add_up(patches, x.shape[2:], W.shape[2:], stride, padding, output_padding, dilation)


def add_up(
    patches: Tensor,
    places: Sequence[int],
    kernel: Sequence[int],
    stride: Each,
    padding: int,
    output_padding: int,
    dilation: Each,
) -> Tensor:
    """Patches (n, c, kernel, places) -> an image, of which `padding` is cut off at each side."""
    steps, spread = each(stride, kernel), each(dilation, kernel)
    sizes = [
        (p - 1) * s + d * (k - 1) + 1 + output_padding
        for p, k, s, d in zip(places, kernel, steps, spread, strict=True)
    ]
    canvas = patches.new_zeros(*patches.shape[:2], *sizes)
    for number, place in enumerate(itertools.product(*map(range, places))):
        corner = [p * s for p, s in zip(place, steps, strict=True)]
        for k, at in enumerate(offsets(corner, kernel, spread)):
            canvas[(..., *at)] += patches[:, :, k, number]
    inside = [slice(padding, size - padding) for size in sizes]
    return canvas[(..., *inside)]
