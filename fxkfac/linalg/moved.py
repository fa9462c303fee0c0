"""Image -> Σ patch patchᵀ without patches, by a kernel of our own, for stride one.

It takes 0.3 to 0.6 of the time that the kernels for rows take for patches, and less than half of
what convolutions do; see `boxes` for what is computed.
"""

from __future__ import annotations

from functools import partial
from math import isfinite, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fxkfac.linalg.boxes import Box, Sizes, boxes_of
from fxkfac.linalg.gram import Gram
from fxkfac.linalg.made_once import made_once
from fxkfac.linalg.places import addresses, layout_of, room
from fxkfac.linalg.tiles import Added, Kernel
from fxkfac.linalg.windows import Axis

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TOGETHER = 1024  # rows of images that are taken together: of one at least
PLANS = 64  # at most that are kept: of a large image one takes megabytes
LONGEST = 128  # rows of a piece: as many rows of two panels as fit the first cache
DOWN, ACROSS = 8, 16  # channels that are multiplied at once: fewer take as long
TILE = 2**14  # multiply-adds take as long as to begin with a box


class Plan(NamedTuple):
    """What a kernel is told of windows.

    Attributes:
        rows: Of the images that are taken together.
        pieces: First rows and lengths of what follows one another in the images.
        boxes: Of every box its first piece, the one behind its last, how many rows further on its
            partners are, and the number of the box that has both the other way round.
        terms: Boxes and signs of all pairs of taps.
        begins: Where those of each pair begin, and where the last ones end.
        taps: Of a window.
    """

    rows: int
    pieces: Int[Tensor, "pieces 2"]
    boxes: Int[Tensor, "boxes 4"]
    terms: Int[Tensor, "terms 2"]
    begins: Int[Tensor, " pairs"]
    taps: int

    def given(self) -> Int[Tensor, " numbers"]:
        """As C has it."""
        parts = self.pieces, self.boxes, self.terms, self.begins
        pieces, boxes, terms, begins = (part.data_ptr() for part in parts)
        numbers = [self.rows, pieces, boxes, len(self.boxes), terms, begins, self.taps]
        return torch.tensor(numbers, device="cpu")


def _plan(axes: tuple[Axis, ...]) -> tuple[Plan, Int[Tensor, " numbers"]]:
    """What there is to tell of windows with stride one; and that as C has it."""
    how = boxes_of(axes)
    sizes = [axis.size for axis in axes]
    size = prod(sizes)
    together = max(1, TOGETHER // size)
    steps = [prod(sizes[k + 1 :]) for k in range(len(sizes))]
    pieces = [_pieces(box, sizes, steps, together) for box in how.boxes]
    ends = torch.tensor([0, *map(len, pieces)], device="cpu").cumsum(0)
    shifts = [sum(r.shift * s for r, s in zip(box, steps, strict=True)) for box in how.boxes]
    partners = torch.tensor([shifts, how.turned], device="cpu")
    numbers = torch.tensor([0, *map(len, how.terms)], device="cpu").cumsum(0)
    terms = torch.tensor([term for pair in how.terms for term in pair], device="cpu")
    found = Plan(
        together * size,
        torch.cat(pieces),
        torch.stack([ends[:-1], ends[1:], *partners], 1),
        terms,
        numbers,
        prod(axis.kernel for axis in axes),
    )
    return found, found.given()


plan = made_once(_plan, PLANS)


def _pieces(box: Box, sizes: list[int], steps: list[int], together: int) -> Int[Tensor, "pieces 2"]:
    """The rows of a box in several images; of inner dimensions that are whole, all follow."""
    first, length, follow = 0, 1, True
    starts = torch.arange(together, device="cpu") * (sizes[0] * steps[0])
    outer = []
    for run, size, step in reversed(list(zip(box, sizes, steps, strict=True))):
        if follow:
            first, length, follow = first + run.low * step, run.length * step, run.length == size
        else:
            outer.append((run, step))
    for run, step in reversed(outer):
        along = torch.arange(run.low, run.high, device="cpu") * step
        starts = (starts.unsqueeze(-1) + along).flatten()
    cuts = torch.arange(0, length, LONGEST, device="cpu")
    starts = first + starts.unsqueeze(-1) + cuts
    lengths = (length - cuts).clamp_max(LONGEST).expand_as(starts)
    return torch.stack([starts.flatten(), lengths.flatten()], 1)


def add_moved(
    gram: Gram,
    kernel: Kernel,
    image: Float[Tensor, "batch channels *space"],
    axes: tuple[Axis, ...],
) -> None:
    """Add Σ patch patchᵀ, for windows with stride one."""
    if not boxes_of(axes).boxes:  # all of them see zeros alone
        return
    x = rearrange(image, "n (g c) ... -> g n ... c", g=len(gram.total))
    gram.add(partial(_add, x=x, axes=axes, kernel=kernel))


def _add(
    total: Float[Tensor, "group d d"],
    scale: float,
    adds: bool,
    x: Float[Tensor, "group batch *space c"],
    axes: tuple[Axis, ...],
    kernel: Kernel,
) -> Added:
    layout, known = layout_of(x), plan(axes)
    threads, of = torch.get_num_threads(), known[1].data_ptr()
    function, (rows, channels) = kernel.functions.moved, layout
    within = room(function.room(rows.number, channels.number, of, threads), x.dtype)
    are_finite = True
    for place, start in zip(addresses(total), addresses(x), strict=True):
        to = place, total.stride(1), scale, adds
        trace = function.run(*to, *layout.at(start), of, within.data_ptr(), threads)
        are_finite &= isfinite(trace)
    return Added(None, are_finite)


def moved_cost(axes: tuple[Axis, ...], sizes: Sizes) -> float:
    """The time of `add_moved`, in multiply-adds."""
    batch, group, channels = sizes
    products = -(-channels // DOWN) * DOWN * -(-channels // ACROSS) * ACROSS
    taken = boxes_of(axes).taken.values()
    rows = batch * sum(prod(run.length for run in box) for box in taken)
    parts = -(-batch * prod(a.size for a in axes) // TOGETHER)
    return group * (rows * products + parts * len(taken) * TILE)
