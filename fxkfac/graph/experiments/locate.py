"""Tapped graph -> where the data are laid out in every tap, by experiment.

Run the graph on some data and on the same data in another order. For a tap with row axes
(r0, r1, ..) exactly one split of one axis into (outer · N · inner) makes the second equal the
first, permuted. No rule per op is needed, and the finding proves itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.linalg import vector_norm

from fxkfac.errors import BatchAxisError
from fxkfac.graph.digits import rounding, tolerance
from fxkfac.graph.form import ONLY, BatchAxis
from fxkfac.graph.tap import Taps
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, OneHotRows, normal_x, normal_y

Layout = tuple[int, int, int]  # axis, outer, inner

FEW_ROUNDINGS = 8.0  # of one op: what sums in another order make of values that are the same


@dataclass(frozen=True)
class Reordered:
    """The data in another order.

    Attributes:
        n: Number of data.
        order: Which datum is at each place.
        lowest: The dtype with the fewest digits of what the graph computes.
    """

    n: int
    order: Tensor
    lowest: torch.dtype


@dataclass(frozen=True)
class Located:
    """What the experiment found.

    Attributes:
        prediction: Batch axis of the prediction.
        uses: Batch axis of every use, `None` where none explains the experiment.
        constant: For every use, whether the gradient at its output is the same for the data in
            any order: it is summed over the data, so that no per-datum part of it is left.
    """

    prediction: Layout | None
    uses: tuple[BatchAxis | None, ...]
    constant: tuple[bool, ...]


def locate(
    run: Callable[[list[Tensor], Taps], Tensor],
    permute: Callable[[list[Tensor], Tensor], list[Tensor]],
    data: list[Tensor],
    order: Tensor,
    uses: Sequence[Use],
    generator: Generator,
    lowest: torch.dtype,
    longer: Callable[[], Sequence[int] | None] | None,
    known: Layout | None = None,
) -> Located:
    """Find the batch axis of the prediction and of every use.

    Args:
        run: The graph.
        permute: Puts data into another order.
        data: The data.
        order: The other one.
        uses: The uses, tapped; a batch axis that one has is kept if it explains the experiment.
        generator: For the cotangent.
        lowest: The dtype with the fewest digits of what the graph computes.
        longer: The shape of the prediction for a datum more, if that can be told; without, a layout
            that is not the only one is none.
        known: A layout of the prediction that is kept if it explains the experiment.

    Raises:
        BatchAxisError: The prediction is the same in any order of the data, and more than one
            layout explains that.
    """
    n = len(order)
    other = Reordered(n, order, lowest)
    first, second = Taps(), Taps()
    f, permuted_f = run(data, first), run(permute(data, other.order), second)
    at = _of_prediction(f.detach(), permuted_f.detach(), other, longer, known)
    if at is None:  # a cotangent that goes wherever the entries of the prediction go
        cotangent, turned = f.detach().cos(), permuted_f.detach().cos()
    else:
        cotangent = torch.randn(
            f.shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        cotangent = cotangent.to(f)
        turned = _permuted(cotangent, at, other)
    before, after = first.gradients(f, cotangent), second.gradients(permuted_f, turned)
    axes, constant = [], []
    for k, use in enumerate(uses):
        g = (before[use.tap], after[use.tap])
        pairs = [g, (first.outputs[use.tap].detach(), second.outputs[use.tap].detach())]
        axes.append(_batch_axis(use, pairs, (first.inputs[k], second.inputs[k]), other))
        alike = n > 1 and axes[-1] is None and bool(g[0].any())
        constant.append(alike and close(*g, lowest))
    if at is not None and any(constant):
        datum = data_of(cotangent, at, n)
        one, rest = (first.gradients(f, cotangent * part) for part in (datum == 0, datum != 0))
        shared = [_share_rows(u, one[u.tap], rest[u.tap]) for u in uses]
        constant = [c and s for c, s in zip(constant, shared, strict=True)]
    return Located(at, tuple(axes), tuple(constant))


def other_order(n: int) -> Tensor:
    """Another order of n data, that a model which rolls or flips them itself does not keep."""
    order = torch.arange(n, device="cpu")
    return order.roll(1) if n < 3 else torch.cat([order[:-1].roll(1), order[-1:]])


def _of_prediction(
    f: Tensor,
    permuted_f: Tensor,
    other: Reordered,
    longer: Callable[[], Sequence[int] | None] | None,
    known: Layout | None,
) -> Layout | None:
    """The layout of the prediction.

    Where the data are alike, their order tells nothing. Then it is an axis that is longer for a
    datum more, and all of it.
    """
    if f.shape != permuted_f.shape:
        return None
    pairs = [(f, permuted_f)]
    if longer is None:
        return _one_layout(pairs, other, known=known)
    fits = _fits(pairs, other, _layouts(f.shape, other.n))
    first = next(fits, None)
    if first is None or other.n < 2 or not close(f, permuted_f, other.lowest):
        return first
    found, shape = [first, *fits], longer()
    if shape is not None:
        found = [(a, o, i) for a, o, i in found if shape[a] == o * (other.n + 1) * i]
    if len(found) > 1:
        listed = " or ".join(f"axis {a} as {o}·N·{i}" for a, o, i in found[:4])
        raise BatchAxisError(
            f"the prediction {tuple(f.shape)} for {other.n} data is the same in any order of them, "
            f"so that it may hold them along {listed}; expected data of which one can be told from "
            "another. Trace with data that differ."
        )
    return found[0] if found else None


def data_of(t: Tensor, at: Layout, n: int) -> Tensor:
    """Which datum each entry of a tensor belongs to; broadcasts to it."""
    axis, outer, inner = at
    datum = torch.arange(n, device=t.device).view(-1, 1).expand(outer, n, inner)
    return datum.flatten().view(-1, *[1] * (t.ndim - axis - 1))


def _share_rows(use: Use, one: Tensor, rest: Tensor) -> bool:
    """Whether a row has gradients from one datum and from the others.

    Rows that are chosen from all data, as by experts of a given capacity, are the same in any
    order, too; but each one's gradient comes from its own datum alone.
    """
    first, others = ((normal_y(use, g, None) != 0).any(-1) for g in (one, rest))
    return bool((first & others).any())


def _batch_axis(
    use: Use,
    outputs: list[tuple[Tensor, Tensor]],
    inputs: tuple[Input, Input],
    other: Reordered,
) -> BatchAxis | None:
    """The one layout that explains gradient, output and input of a use."""
    rows = use.form.rows
    if not rows:
        return ONLY if other.n == 1 else None
    pairs = [
        (_by_rows(normal_y(use, a, None)), _by_rows(normal_y(use, b, None))) for a, b in outputs
    ]
    x = [normal_x(use, i, None) for i in inputs]
    if isinstance(x[0], Tensor) and isinstance(x[1], Tensor):
        pairs.append((_by_rows(x[0].detach()), _by_rows(x[1].detach())))
    elif isinstance(x[0], OneHotRows) and isinstance(x[1], OneHotRows):
        pairs.append((x[0].indices.unsqueeze(-1), x[1].indices.unsqueeze(-1)))
    at = use.batch
    known = None if at is None else (rows.index(at.axis), at.outer, at.inner)
    found = _one_layout(pairs, other, len(rows), known)
    return None if found is None else BatchAxis(rows[found[0]], *found[1:])


def _one_layout(
    pairs: list[tuple[Tensor, Tensor]],
    other: Reordered,
    axes: int | None = None,
    known: Layout | None = None,
) -> Layout | None:
    """The known layout, if it explains the experiment; else the only one that does.

    Data that hardly differ, as far from the inputs of an untrained net, are told apart by fewer
    digits: what is equal but for a few roundings, or to the bit, comes before what is about equal.
    A single datum has all rows.
    """
    shape = pairs[0][0].shape[:axes]
    layouts = list(_layouts(shape, other.n))
    if known in layouts and next(_fits(pairs, other, [known]), None):
        return known
    for digits in (None, FEW_ROUNDINGS, 0.0):
        layouts = list(_fits(pairs, other, layouts, digits))
        if len(layouts) <= 1 or other.n == 1:
            break
    return layouts[0] if len(layouts) == 1 or (layouts and other.n == 1) else None


def _by_rows(t: Tensor) -> Tensor:
    """(group, rows.., d) as (rows.., group d)."""
    return t.movedim(0, -2).flatten(-2)


def _fits(
    pairs: list[tuple[Tensor, Tensor]],
    other: Reordered,
    layouts: Iterable[Layout],
    roundings: float | None = None,
) -> Iterator[Layout]:
    """Those layouts under which every second tensor is the first one, permuted."""
    for layout in layouts:
        if all(_explains(a, b, layout, other, roundings) for a, b in pairs):
            yield layout


def _layouts(shape: Sequence[int], n: int) -> Iterator[Layout]:
    """All ways in which one of these axes can hold n data."""
    for axis, length in enumerate(shape):
        for outer in _divisors(length // n) if length % n == 0 else ():
            yield axis, outer, length // n // outer


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _explains(
    a: Tensor, b: Tensor, layout: Layout, other: Reordered, roundings: float | None
) -> bool:
    axis, outer, inner = layout
    if a.shape[axis] == 1 and other.n > 1:  # this tensor is broadcast over the data
        return close(a, b, other.lowest, roundings)
    if a.shape[axis] != outer * other.n * inner:
        return False
    return close(_permuted(a, layout, other), b, other.lowest, roundings)


def _permuted(t: Tensor, layout: Layout, other: Reordered) -> Tensor:
    axis, outer, inner = layout
    split = t.unflatten(axis, (outer, other.n, inner))
    return split.index_select(axis + 1, other.order.to(t.device)).flatten(axis, axis + 2)


def close(a: Tensor, b: Tensor, lowest: torch.dtype, roundings: float | None = None) -> bool:
    """Equal up to the rounding of sums in another order: half of the digits, or so many of it."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    off, *sizes = (vector_norm(t, dtype=torch.float64) for t in (a - b, a, b))
    at_most = tolerance(a, lowest) if roundings is None else roundings * rounding(a, lowest)
    return bool(off <= at_most * sum(sizes))
