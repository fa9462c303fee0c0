"""Taps of a use -> its normal form: x (group, batch, shared, in), y (group, batch, shared, out).

Design: y[g, rows, o] = Σ_i W[g, i, o] x[g, rows, i]. Whoever is above this file sees only that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from fxkfac.graph.axes import axis_lengths, axis_tokens
from fxkfac.graph.form import BatchAxis, Folded, Form, OneHot, Patches
from fxkfac.graph.uses.ir import Use

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class OneHotRows:
    """Rows that are one-hot vectors, held as the positions of their ones.

    Attributes:
        indices: The positions; a row whose index is `ignored` is zero.
        size: Length of each vector.
        scale: What stands in the place of the one.
    """

    indices: Int[Tensor, "batch shared"]
    size: int
    ignored: int | None
    scale: float


class Routed(NamedTuple):
    """The tapped input of a use whose rows take the weight of one group each."""

    x: Tensor
    numbers: Tensor


Input = Tensor | Routed | None  # what is tapped as the input of a use


def detached(x: Input) -> Input:
    """The same, without the graph behind it."""
    if isinstance(x, Routed):
        return Routed(x.x.detach(), x.numbers)
    return None if x is None else x.detach()


def unfold(x: Tensor, patches: Patches) -> Tensor:
    """The patches that a convolution's kernel sees.

    Shape (.., channels, *spatial) becomes (.., channels, *places, *kernel).
    """
    d = len(patches.kernel)
    x = F.pad(x, [p for pair in reversed(patches.padding) for p in pair])
    for size, stride, dilation in zip(
        patches.kernel, patches.stride, patches.dilation, strict=True
    ):
        # unfold puts its kernel axis last: the next spatial axis is the d-th from the end again.
        x = x.unfold(-d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def _only(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Drop unit axes; einops calls it where a pattern leaves axes out."""
    assert all(x.shape[a] == 1 for a in axes), "one-hot rows cannot be summed"
    return x.squeeze(axes)


def normal_x(use: Use, x: Input, batch: BatchAxis | None) -> Tensor | OneHotRows | None:
    """The input of a use in normal form; `None` where it is the constant one.

    Row axes that the input does not have come out with length one, all or none of the shared ones.
    Where every row takes the weight of one group, it is zero in the others.
    """
    if isinstance(x, Routed):
        rows = normal_x(use, x.x, batch)
        assert isinstance(rows, Tensor)
        return rows * group_of_rows(use, x, batch).unsqueeze(-1)
    return None if x is None else use.form.reader(_normal_x, x, use, batch)


def _normal_x(x: Tensor, use: Use, batch: BatchAxis | None) -> Tensor | OneHotRows:
    form = use.form
    prepare = form.prepare
    if isinstance(prepare, OneHot):
        x, axes = _spread(use, x, form.x.removesuffix(" v"), batch)
        form = replace(form, x=f"{axes} v")
        left, right = form.normal_x(batch).split(" -> ")
        pattern = f"{left.removesuffix(' v')} -> {right.removeprefix('() ').removesuffix(' (v)')}"
        # An axis that the output does not have is a unit axis, as in arange(T)[None].
        indices = reduce(x, pattern, _only, **form.row_sizes(form.x, batch))
        indices = indices.remainder(prepare.size)  # W[-1] is the last one
        return OneHotRows(indices, prepare.size, prepare.ignored, form.scale)
    if isinstance(prepare, Patches):
        x = unfold(x, prepare)
    x, axes = _spread(use, x, form.x, batch)
    form = form if axes == form.x else replace(form, x=axes)
    x = reduce(x, form.normal_x(batch), "sum", **form.row_sizes(axes, batch))
    return x if form.scale == 1.0 else form.scale * x


def _spread(use: Use, t: Tensor, axes: str, batch: BatchAxis | None) -> tuple[Tensor, str]:
    """Repeat a tensor along the shared axes that it lacks, where it has others of them."""
    lacking = use.form.spread(axes, batch) if batch is not None else []
    if batch is None or not lacking:
        return t, axes
    lengths = axis_lengths(use.form.y, use.y_shape, use.form.sizes)
    lengths |= {batch.axis: batch.outer * batch.inner}  # the same for all data
    sizes = {a: lengths[a] for a in lacking} | dict(use.form.row_sizes(axes, None))
    wider = f"{axes} {' '.join(lacking)}"
    return repeat(t, f"{axes} -> {wider}", **sizes), wider


def group_of_rows(
    use: Use, x: Routed, batch: BatchAxis | None
) -> Bool[Tensor, "group batch shared"]:
    """Whether a row takes the weight of a group, for every group; (group, rows..) without batch."""
    form, routes = use.form, use.form.routes
    assert routes is not None
    numbers, axes = _spread(use, _numbers(form, x), routes.axes, batch)
    pattern = replace(form, routes=replace(routes, axes=axes)).normal_routes(batch)
    numbers = rearrange(numbers, pattern, **form.row_sizes(axes, batch)).squeeze(-1)
    groups = torch.arange(routes.size, device=numbers.device)
    return numbers == groups.view(-1, *[1] * (numbers.ndim - 1))


def _numbers(form: Form, x: Routed) -> Tensor:
    """The number of every row's group; no group's where a row is padding, or behind the last."""
    assert form.routes is not None
    if x.numbers.dtype == torch.bool:
        return (~x.numbers).long()  # the one weight there is has the number 0
    if not form.routes.ends:
        return x.numbers.remainder(form.routes.size)  # W[-1] is the last one
    rows = x.x.shape[axis_tokens(form.x).index(form.routes.axes)]
    places = torch.arange(rows, dtype=x.numbers.dtype, device=x.numbers.device)
    return torch.searchsorted(x.numbers, places, right=True)


def normal_y(use: Use, y: Tensor, batch: BatchAxis | None) -> Tensor:
    """The output of a use, or a gradient at it, in normal form."""
    rows: Tensor = use.form.reader(_normal_y, y, use, batch)
    return rows


def _normal_y(y: Tensor, use: Use, batch: BatchAxis | None) -> Tensor:
    if use.form.folded is not None:
        y = _unfolded(y, use.form.folded)
    return rearrange(y, use.form.normal_y(batch), **use.form.row_sizes(use.form.y, batch))


def every_row(use: Use, y: Tensor) -> Tensor:
    """The rows of an output, or of a gradient at it, in one axis where this needs no copy."""
    flat = use.form.reader.view(_in_one_axis, y, use)
    return normal_y(use, y, None) if flat is None else flat


def _in_one_axis(y: Tensor, use: Use) -> Tensor:
    return _normal_y(y, use, None).flatten(1, -2)


def _unfolded(y: Tensor, folded: Folded) -> Tensor:
    """The patches of a gradient, one for each place of the input; output padding adds none."""
    y = unfold(y, folded.patches)
    d = len(folded.places)
    for k, size in enumerate(folded.places):
        y = y.narrow(k - 2 * d, 0, size)
    return y


def normal_weight(use: Use) -> Tensor:
    """The numbers of the parameters' entries in normal form, (group, in, out).

    Entries are numbered along the concatenated rvec of `use.parameters`.
    """
    sizes = use.form.row_sizes(use.form.weight, None)
    return rearrange(use.view.index(), use.form.normal_weight, **sizes)


def parameter_gradient(use: Use, x: Input, gradient: Tensor) -> Float[Tensor, " numel"]:
    """The use's part of the parameters' gradient, Σ_rows x gᵀ mapped back through the view.

    Args:
        use: The use; its batch axis need not be known.
        x: The input of the use, as tapped.
        gradient: The gradient at its output.
    """
    rows = normal_x(use, x, None)
    g = normal_y(use, gradient, None).flatten(1, -2)  # (group, rows, out)
    if isinstance(rows, OneHotRows):
        kept = rows.indices.expand(normal_y(use, gradient, None).shape[1:-1]).flatten()
        if rows.ignored is not None:
            g = g * (kept != rows.ignored).unsqueeze(-1)
        part = g.new_zeros(1, rows.size, g.shape[-1]).index_add(1, kept, rows.scale * g)
    elif rows is None:
        part = use.form.scale * g.sum(1, keepdim=True)
    else:
        full = normal_y(use, gradient, None).shape[1:-1]
        dtype = torch.promote_types(rows.dtype, g.dtype)  # under autocast they may differ
        flat, g = rows.expand(-1, *full, -1).flatten(1, -2).to(dtype), g.to(dtype)
        part = flat.mT @ g  # Σ_rows x gᵀ, (group, in, out)
    entries = normal_weight(use).flatten().to(part.device)
    return part.new_zeros(use.view.numel).index_add(0, entries, part.flatten())
