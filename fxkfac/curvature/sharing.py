"""Taps of a term -> rows of A and rows of B, by expand or reduce (Eschenhagen et al. 2023).

    expand:  A = Σ_rows x xᵀ               B = Σ_rows g gᵀ           every row by itself
    reduce:  A = Σ_n x̂ x̂ᵀ, x̂ = mean_s x    B = Σ_n ĝ ĝᵀ, ĝ = Σ_s g   one row per datum

The uses of a term are one more shared axis. A bias by itself has one row per datum, always: its
gradient is Σ_s g, so that its block is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxkfac.curvature.plan import Scales, TermPlan
from fxkfac.errors import BatchAxisError, UnsupportedUse
from fxkfac.graph.form import BatchAxis
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import (
    Input,
    OneHotRows,
    Routed,
    every_row,
    group_of_rows,
    normal_weight,
    normal_x,
    normal_y,
)
from fxkfac.linalg import made_once
from fxkfac.linalg.operators.entries import LARGEST_DENSE
from fxkfac.precision import accurate, accurate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

SHARINGS = ("expand", "reduce")

Rows = Tensor | OneHotRows | None

# Ones where a row of a use counts, for every group or for all alike; `None` where all rows do.
# Without a batch axis, all rows are one datum's.
Kept = Tensor | None


def chosen_groups(use: Use, x: Routed, y: Tensor) -> Float[Tensor, "group batch shared"]:
    """Ones where a row has chosen a group; without a batch axis, all rows are one datum's.

    Rows that choose together, as those of one sequence may, are so many rows.
    """
    chosen = group_of_rows(use, x, use.batch)
    chosen = chosen.expand(-1, *normal_y(use, y, use.batch).shape[1:-1])
    if use.batch is None:
        chosen = chosen.flatten(1).unsqueeze(1)
    return chosen.to(x.x.dtype)


def rows_kept(real: Tensor | None, groups: Tensor | None) -> Kept:
    """Which rows count, of shape (group, batch, shared), or (1, batch, shared).

    Args:
        real: Which rows are no padding, (batch, shared); `None` where all are.
        groups: Which group a row has chosen; `None` where all rows are every group's.
    """
    if real is None or groups is None:
        return groups if real is None else real.unsqueeze(0)
    return groups * real


def expanded_input(
    use: Use, x: Input, y: Tensor, kept: Kept
) -> tuple[Float[Tensor, "group *rows d_in"], int | Tensor]:
    """Every row x of a use, and their number.

    Args:
        use: The use, whose input is not the constant one.
        x: Its input, as tapped.
        y: The output of its op, as tapped; for its shape.
        kept: Which rows count.
    """
    if kept is None and isinstance(x, Tensor):
        flat = use.form.reader.view(_in_one_axis, x, use, y.shape, y.dtype)
        if flat is not None:
            return accurate(flat), flat.shape[1]
    batch = None if kept is None else use.batch
    like = normal_y(use, y, batch)
    rows = accurate(_dense(normal_x(use, x, batch), like.shape[1:-1], y.dtype))
    return _by_datum(use, rows, kept), _number_of_rows(like, kept)


def _in_one_axis(x: Tensor, use: Use, y_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    rows = _dense(normal_x(use, x, None), use.form.row_lengths(y_shape), dtype)
    return rows.flatten(1, -2)


def reduced_input(
    use: Use, x: Input, y: Tensor, kept: Kept, scales: Scales, x_sum: Tensor | None = None
) -> tuple[Float[Tensor, "group batch d_in"], Float[Tensor, "group batch"]]:
    """Σ_s x̃ of every datum, x̃ = (x, scales), and how many terms the sum has.

    Σ_s x may be given, where it is known without its terms.
    """
    like = normal_y(use, y, known(use))
    if x_sum is None:
        rows = accurate(_dense(normal_x(use, x, known(use)), like.shape[1:-1], y.dtype))
        x_sum = _masked(rows, kept).sum(2)
    places = _places(like, kept)
    ones = places.expand(len(x_sum), -1).unsqueeze(-1)
    return torch.cat([x_sum, *(scale * ones for scale in scales)], dim=-1), places


def counted_input(use: Use, x: Input, y: Tensor, kept: Kept) -> tuple[Tensor, int | Tensor]:
    """For a use whose rows are one-hot, how often each one occurs, and the number of rows."""
    batch = None if kept is None else use.batch
    like, rows = normal_y(use, y, batch), normal_x(use, x, batch)
    assert isinstance(rows, OneHotRows)
    indices = rows.indices.expand(like.shape[1:-1]).flatten()
    weights = None if kept is None else kept.flatten().to(accurate_dtype(like))
    ones = torch.ones_like(indices) if weights is None else weights
    counts = ones.new_zeros(rows.size).index_add(0, indices, ones)  # bincount waits for a GPU
    counts = rows.scale**2 * counts.to(accurate_dtype(like))
    if rows.ignored is not None:
        counts[rows.ignored] = 0.0
    return counts, _number_of_rows(like, kept)


def expanded_output(use: Use, g: Tensor, kept: Kept) -> Float[Tensor, "group *rows d_out"]:
    """Every row of a gradient at the output of a use."""
    if kept is None:
        return accurate(every_row(use, g))
    return accurate(_by_datum(use, normal_y(use, g, use.batch), kept))


def reduced_output(use: Use, g: Tensor, kept: Kept) -> Float[Tensor, "group batch d_out"]:
    """Σ_s g of every datum."""
    return _masked(accurate(normal_y(use, g, known(use))), kept).sum(2)


def bias_output(term: TermPlan, use: Use, g: Tensor) -> Float[Tensor, "1 batch numel"]:
    """Every datum's gradient of a bias by itself: Σ_s g, at the places of its entries."""
    flat = summed_gradient(use, g)
    places, numel = _bias_places(term, use)
    _require_formable(term, numel)
    if places is not None:
        flat = flat.new_zeros(len(flat), numel).index_add(1, places.to(flat.device), flat)
    return flat.unsqueeze(0)


def summed_gradient(use: Use, g: Tensor) -> Float[Tensor, "batch group_d_out"]:
    """Every datum's gradient of a bias by one of its uses: Σ_s g, in the order of its entries."""
    rows = accurate(normal_y(use, g, known(use))).sum(2)
    return use.form.scale * rows.movedim(0, 1).flatten(1)


def _by_datum(use: Use, x: Tensor, kept: Kept) -> Float[Tensor, "group *rows d"]:
    """Rows of a use, of which those that do not count become zero.

    Without a batch axis there may be any number of row axes, two as well: all are one datum's.
    """
    if kept is not None and use.batch is None:
        x = x.flatten(1, -2).unsqueeze(1)
    return _masked(x, kept)


def _masked(x: Float[Tensor, "group batch shared d"], kept: Kept) -> Tensor:
    """Rows that do not count become zero."""
    return x if kept is None else x * kept.unsqueeze(-1).to(x.dtype)


def _number_of_rows(y: Tensor, kept: Kept) -> int | Tensor:
    """The number of rows of an output in normal form; of every group, where these differ."""
    if kept is None:
        return y.shape[1:-1].numel()
    number = kept.count_nonzero((1, 2))
    return int(number) if len(number) == 1 else number


def _places(y: Tensor, kept: Kept) -> Float[Tensor, "group batch"]:
    """The number of rows of every datum in an output in normal form."""
    if kept is None:
        return y.new_full((1, y.shape[1]), y.shape[2], dtype=accurate_dtype(y))
    return kept.to(accurate_dtype(y)).sum(2)


def _require_formable(term: TermPlan, numel: int) -> None:
    if numel**2 > LARGEST_DENSE:
        raise UnsupportedUse(
            f"{', '.join(term.parameters)} is added to the data and has {numel:,} entries: its "
            f"exact block would hold {numel**2:,} numbers; expected at most {LARGEST_DENSE:,}. "
            "Leave it out by `params` when tracing; or, if it is a table of positions, look it up "
            "as an embedding, which has small factors."
        )


def known(use: Use) -> BatchAxis:
    """The batch axis of a use. Raises `BatchAxisError` where the experiment did not find one."""
    if use.batch is None:
        at = f" ({use.source})" if use.source else ""
        raise BatchAxisError(
            f"{', '.join(use.parameters)} enters {use.op}{at}, and no one axis of its output "
            f"{use.y_shape} holds the data in their order; expected (outer · N · inner) on one "
            "axis. Use fxkfac.kfac with sharing='expand' and separate_weight_and_bias=False, which "
            "need none, or select other parameters; or, where the example has sent no row there, "
            "as to one of several experts, trace with data that send some."
        )
    return use.batch


def written_out(rows: OneHotRows, dtype: torch.dtype) -> Float[Tensor, "1 batch shared size"]:
    """One-hot vectors as such."""
    hot = rows.scale * F.one_hot(rows.indices.long(), rows.size).to(dtype).unsqueeze(0)
    if rows.ignored is not None:
        hot[..., rows.ignored] = 0.0
    return hot


def _dense(rows: Rows, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows with every row axis of the output, of these lengths; one-hot vectors written out."""
    assert rows is not None
    rows = written_out(rows, dtype) if isinstance(rows, OneHotRows) else rows
    return rows.expand(-1, *lengths, -1)


@made_once  # the same for every vector and every batch
def _bias_places(term: TermPlan, use: Use) -> tuple[Tensor | None, int]:
    """Where the entries of one use are among all that the term touches, and how many these are.

    The places are `None` where they are all of these in their order.
    """
    touched, own = term.touched(), normal_weight(use).flatten()
    places = None if torch.equal(touched, own) else torch.searchsorted(touched, own)
    return places, len(touched)
