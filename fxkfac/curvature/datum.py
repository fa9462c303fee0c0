"""Taps of a term -> rows of every datum, some data at a time: what its own gradients are made of.

    G̃_{n,c} = Σ_uses Σ_s x̃ gᵀ        x̃ = (x, scales)

The uses of a term are one more shared axis. Rows that are padding count for nothing, here as in A
and B. Where an input is the same at all places, its gradients are summed over them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.plan import Scales, TermPlan
from fxkfac.curvature.sharing import Kept, bias_output, known, written_out
from fxkfac.curvature.together import of_each
from fxkfac.errors import BatchAxisError
from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, OneHotRows, normal_x, normal_y
from fxkfac.linalg.orders import Sizes
from fxkfac.linalg.rows import DatumRows, Rows, TokenRows, chunks

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Heard:
    """What is known of one use of a term.

    Attributes:
        scales: What the biases that have joined are multiplied by at its rows.
        x: Its input, as tapped.
        g: The gradients at its output, of all vectors in the first axis.
        kept: Which rows count, (group, batch, shared); `None` where all do.
    """

    use: Use
    scales: Scales
    x: Input
    g: Tensor
    kept: Kept


@dataclass(frozen=True)
class _Normal:
    """The same in normal form."""

    x: Float[Tensor, "group batch shared d_in"] | OneHotRows
    g: Float[Tensor, "group batch shared vectors d_out"]
    kept: Kept

    def some(self, start: int, size: int) -> _Normal:
        """Of some data; what is the same for all of them stays as it is."""
        kept = None if self.kept is None else self.kept.narrow(1, start, size)
        return _Normal(self._some_x(start, size), self.g.narrow(1, start, size), kept)

    def _some_x(self, start: int, size: int) -> Tensor | OneHotRows:
        x = self.x
        if isinstance(x, OneHotRows):
            if len(x.indices) == 1:
                return x
            return replace(x, indices=x.indices.narrow(0, start, size))
        return x if x.shape[1] == 1 else x.narrow(1, start, size)


def require_independent(tapped: Tapped) -> None:
    """Raise `BatchAxisError` where one datum's prediction depends on others of its batch.

    And where it is not known whether it does.
    """
    if tapped.alike:
        raise BatchAxisError(
            "it is not known whether one datum's prediction depends on the others', as by batch "
            "norm in train mode: the data of the example are alike, and to put one in the place of "
            "another changes nothing; expected data that differ. Trace with such."
        )
    if tapped.coupled:
        raise BatchAxisError(
            "one datum's prediction depends on the others', as by batch norm in train mode, so "
            "that no gradient is one datum's own; expected independent data. Call model.eval() "
            "before tracing."
        )


def sizes_of(term: TermPlan, heard: Sequence[Heard], d_in: int, d_out: int) -> Sizes:
    """How long the axes of the rows are, from the taps' shapes alone."""
    shared = 1 if term.is_bias else sum(_shared(h) for h in heard)
    return Sizes(shared, len(heard[0].g), d_in, d_out)


def _shared(h: Heard) -> int:
    """The number of rows that one use has for each datum."""
    batch = known(h.use)
    y = normal_y(h.use, torch.empty(h.g.shape[1:], device="meta"), batch)
    if h.kept is None and isinstance(h.x, Tensor):
        x = normal_x(h.use, torch.empty_like(h.x, device="meta"), batch)
        if isinstance(x, Tensor) and x.shape[2] == 1:
            return 1
    return y.shape[2]


def rows_of(
    term: TermPlan,
    heard: Sequence[Heard],
    data: int,
    vectors: int,
    dtype: torch.dtype,
    tokens: bool,
) -> Iterator[Rows]:
    """The rows of some data and vectors after those of others.

    Args:
        term: The term.
        heard: Of each of its uses at which gradients arrive.
        data, vectors: How many at a time, at most.
        dtype: Of the rows.
        tokens: Whether rows that are one-hot at all uses come by their tokens.

    Raises:
        BatchAxisError: It is not known whose row a row is.
    """
    for c in range(0, len(heard[0].g), vectors):
        part = [replace(h, g=h.g[c : c + vectors]) for h in heard]
        if term.is_bias:
            yield _bias_rows(term, part, dtype)
            continue
        readers = [_reader(h) for h in part]
        for start, size in chunks(_size(part[0]), data):
            some = [read(start, size) for read in readers]
            if tokens and term.counts_only:
                yield _token_rows(some, dtype)
            else:
                uses = [_dense(s, h.scales, dtype) for s, h in zip(some, part, strict=True)]
                yield _side_by_side(uses)


def _bias_rows(term: TermPlan, heard: Sequence[Heard], dtype: torch.dtype) -> DatumRows:
    """A bias by itself: its input is one, its gradient Σ_s g over all uses."""
    total: Tensor | None = None
    for h in heard:
        g = _vectors_last(of_each(partial(bias_output, term, h.use), h.g), len(h.g))
        total = g if total is None else total + g
    assert total is not None
    g = total.to(dtype).unsqueeze(2)  # (1, batch, 1, vectors, numel)
    return DatumRows(g.new_ones(1, g.shape[1], 1, 1), g)


def _vectors_last(g: Tensor, vectors: int) -> Tensor:
    """(group, vectors, .., out) -> (group, .., vectors, out); one vector has no axis yet."""
    return g.unsqueeze(-2) if vectors == 1 else g.movedim(1, -2)


def _size(h: Heard) -> int:
    """Number of data."""
    y = normal_y(h.use, torch.empty(h.g.shape[1:], device="meta"), known(h.use))
    return y.shape[1]


def _reader(h: Heard) -> Callable[[int, int], _Normal]:
    """(start, size) -> the rows of these data.

    What is taken as patches grows: so it is cut before, where the data have an axis of their own.
    """
    at_x, at_y = (_data_axis(h.use, axes) for axes in (h.use.form.x, h.use.form.y))
    x = h.x
    if not isinstance(x, Tensor) or at_x is None or at_y is None:
        return _normal(h).some
    if x.shape[at_x] != h.g.shape[at_y + 1]:
        return _normal(h).some

    def read(start: int, size: int) -> _Normal:
        kept = None if h.kept is None else h.kept.narrow(1, start, size)
        own_x, own_g = x.narrow(at_x, start, size), h.g.narrow(at_y + 1, start, size)
        return _normal(replace(h, x=own_x, g=own_g, kept=kept))

    return read


def _data_axis(use: Use, axes: str) -> int | None:
    """Which axis of a tensor is that of the data and of nothing else, if one is."""
    batch, tokens = known(use), axis_tokens(axes)
    alone = batch.outer == batch.inner == 1 and batch.axis in tokens
    return tokens.index(batch.axis) if alone else None


def _normal(h: Heard) -> _Normal:
    batch = known(h.use)
    g = _vectors_last(of_each(partial(normal_y, h.use, batch=batch), h.g), len(h.g))
    x = normal_x(h.use, h.x, batch)
    assert x is not None
    return _Normal(x, g, h.kept)


def _dense(own: _Normal, scales: Scales, dtype: torch.dtype) -> DatumRows:
    """Rows x̃ and g of one use, one-hot rows written out."""
    x, g = own.x, own.g.to(dtype)
    n, shared = g.shape[1:3]
    x = written_out(x, dtype) if isinstance(x, OneHotRows) else x
    ones = x.new_ones(*x.shape[:-1], 1)
    x = torch.cat([x, *(scale * ones for scale in scales)], dim=-1).to(dtype)
    if own.kept is not None:
        x = x.expand(-1, n, shared, -1) * own.kept.unsqueeze(-1).to(dtype)
    elif x.shape[2] == 1:
        g = g.sum(2, keepdim=True)
    return DatumRows(x.expand(-1, n, -1, -1), g)


def _side_by_side(uses: Sequence[DatumRows]) -> DatumRows:
    """The uses of a term as one more shared axis."""
    if len(uses) == 1:
        return uses[0]
    x_group, g_group = max(len(r.x) for r in uses), max(len(r.g) for r in uses)
    return DatumRows(
        torch.cat([r.x.expand(x_group, -1, -1, -1) for r in uses], dim=2),
        torch.cat([r.g.expand(g_group, -1, -1, -1, -1) for r in uses], dim=2),
    )


def _token_rows(uses: Sequence[_Normal], dtype: torch.dtype) -> TokenRows:
    """Rows of one-hot inputs; those of one datum with the same token become one."""
    each = [_tokens_of(own, dtype) for own in uses]
    places, g = torch.cat([r.places for r in each]), torch.cat([r.g for r in each])
    if len(places) > each[0].n:  # a datum with one row has no two of the same
        places, joined = places.unique(return_inverse=True)
        g = g.new_zeros(len(places), *g.shape[1:]).index_add(0, joined, g)
    return replace(each[0], places=places, g=g)


def _tokens_of(own: _Normal, dtype: torch.dtype) -> TokenRows:
    """The rows of one use; several may be of one token yet, in any order."""
    assert isinstance(own.x, OneHotRows)
    x, g = own.x, own.x.scale * own.g[0].to(dtype)  # (batch, shared, vectors, out)
    n, shared = g.shape[:2]
    tokens = x.indices.expand(n, shared)
    keep = None if own.kept is None else own.kept[0].to(dtype)
    if x.ignored is not None:
        real = (tokens != x.ignored).to(dtype)
        keep = real if keep is None else keep * real
    g = g if keep is None else g * keep[..., None, None]
    datum = torch.arange(n, device=tokens.device).unsqueeze(-1)
    return TokenRows((datum * x.size + tokens).flatten(), g.flatten(0, 1), x.size, n)
