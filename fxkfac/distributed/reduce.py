"""Factors of every rank's data -> those of all data: one sum over ranks.

    A = Σ_r (R / R_r) A_r        B = (1/#rows) Σ_r #rows_r B_r

with the counts of all ranks in R and #rows, which are exchanged before. What is sent is one flat
buffer for every dtype: one triangle each of A, B and dense exact blocks, exact diagonals, and of
a step loss and gradients; an A that several terms share is sent once. Where groups have rows of
their own, as experts do, their numbers are a second, small buffer of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxkfac.curvature.factors import Factors, divisor, require_factors, scale_of
from fxkfac.curvature.step import Step
from fxkfac.distributed.agree import Has, agreed, common_inputs
from fxkfac.distributed.flat import flat
from fxkfac.distributed.parts import (
    Part,
    Piece,
    factors_of,
    pieces,
    products,
    with_sums,
)
from fxkfac.distributed.workers import Workers
from fxkfac.errors import NoDataError, OptionError
from fxkfac.isolation import full_precision
from fxkfac.linalg.triangle import pack_symmetric, unpack_symmetric

AnyPart = TypeVar("AnyPart", Factors, Step)


def all_reduce(part: AnyPart, group: Any = None) -> AnyPart:
    """The factors, or the step, of all ranks' data; every rank of the group calls it.

    Equal to those that one process computes of all data, up to the rounding of sums in another
    order; sampled labels are each rank's own. Shards may differ in length. A rank whose data hold
    no batch, or no target that counts, passes the `part` of the `NoDataError` that it got.

    Args:
        part: What `fxkfac.kfac` or `fxkfac.step` returned for this rank's data; not changed.
        group: A group of `torch.distributed`; all ranks by default. Tensors are sent from the
            device that they are on: with NCCL, a GPU.

    Returns:
        The same on every rank, bit for bit.

    Raises:
        MergeError: Ranks hold results of different programs or settings; on every rank, and names
            those that differ.
        NoDataError: No rank has data, or none has a target that counts; on every rank.
        OptionError: This rank's part is neither factors nor a step: a running average, say, or
            factors with corrections.
        RankError: There is no process group, or this process is not in it; or another rank's part
            is none.
    """
    workers = Workers.of(group)
    try:
        require_factors(factors_of(part))
    except OptionError as error:  # raised again, when all ranks know of it
        return reduced(workers, error, torch.device("cpu"))
    return reduced(workers, part, factors_of(part).like.device)


@full_precision()
def reduced(workers: Workers, part: Any, device: torch.device) -> Any:
    """The same; a rank that has failed passes its error, and all ranks raise."""
    heard = agreed(workers, part, device)
    n, count = sum(h.n for h in heard), sum(h.count for h in heard)
    likelihood = factors_of(part).likelihood
    _require_data(n)
    likelihood.reduction_factor(count)
    layout = _layout(workers, part, heard, device)
    firsts = _first_pieces(layout, common_inputs([h.shared for h in heard if h.n]))
    sent = sorted(set(firsts))
    has_data = heard[workers.place].n > 0
    shapes = [(layout[k].sent_shape, layout[k].dtype) for k in sent]
    buffers, room = flat(shapes, device, zero=not has_data)
    if has_data:
        R, own = scale_of(likelihood, count), scale_of(likelihood, factors_of(part).count)
        _fill(part, sent, room, R / own)
    for buffer in buffers:
        dist.all_reduce(buffer, group=workers.group)
    sums = {k: _unpacked(layout[k], t) for k, t in zip(sent, room, strict=True)}
    of_all = [(piece, sums[first]) for piece, first in zip(layout, firsts, strict=True)]
    return with_sums(part, n, count, _rows(heard), of_all)


def _require_data(n: int) -> None:
    if not n:
        raise NoDataError("the data of no rank hold a batch; expected at least one on some rank.")


def _layout(
    workers: Workers, part: Part, heard: Sequence[Has], device: torch.device
) -> list[Piece]:
    """What the tensors are; ranks without data learn it from one with data."""
    own = [piece for piece, _ in pieces(part)] if factors_of(part).n else []
    if all(h.n for h in heard):
        return own
    first = next(place for place, h in enumerate(heard) if h.n)
    known = workers.gather(own if workers.place == first else [], device)
    return known[first]


def _rows(heard: Sequence[Has]) -> list[int | None]:
    """The number of rows of every product on all ranks together."""
    own = zip(*(h.rows for h in heard if h.n), strict=True)
    return [None if None in rows else sum(r or 0 for r in rows) for rows in own]


def _first_pieces(layout: Sequence[Piece], shared: Sequence[int]) -> list[int]:
    """For every piece, the first one that is the same tensor on all ranks: an A of other terms."""
    inputs = [k for k, piece in enumerate(layout) if piece.what == "A"]
    same = {k: inputs[first] for k, first in zip(inputs, shared, strict=True)}
    return [same.get(k, k) for k in range(len(layout))]


def _fill(part: Part, sent: Sequence[int], room: Sequence[Tensor], weight: float) -> None:
    """Write a rank's summands: A and all else by the weight of its data, B by its rows."""
    found = pieces(part)
    rows = iter(products(factors_of(part)))
    weights = [
        divisor(next(rows).rows) if piece.what == "B" else 1 if piece.what == "rows" else weight
        for piece, _ in found
    ]
    for k, place in zip(sent, room, strict=True):
        piece, t = found[k]
        if piece.is_symmetric:
            pack_symmetric(t, place)
        else:
            place.copy_(t)
        place.mul_(weights[k])


def _unpacked(piece: Piece, t: Tensor) -> Tensor:
    return unpack_symmetric(t) if piece.is_symmetric else t.clone()
