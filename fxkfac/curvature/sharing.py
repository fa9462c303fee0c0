"""Taps of a term -> rows of A and rows of B, by expand or reduce (Eschenhagen et al. 2023).

    expand:  A = Σ_rows x xᵀ               B = Σ_rows g gᵀ           every row by itself
    reduce:  A = Σ_n x̂ x̂ᵀ, x̂ = mean_s x    B = Σ_n ĝ ĝᵀ, ĝ = Σ_s g   one row per datum

The uses of a term are one more shared axis. A bias by itself has one row per datum, always: its
gradient is Σ_s g, so that its block is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import BatchAxisError, FxkfacError
from fxkfac.graph.form import BatchAxis
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import (
    Input,
    OneHotRows,
    Routed,
    group_of_rows,
    normal_weight,
    normal_x,
    normal_y,
)

if TYPE_CHECKING:
    from jaxtyping import Float

SHARINGS = ("expand", "reduce")

Inputs = Callable[[Use], Input]
Gradients = Callable[[Use], Tensor]
Rows = Tensor | OneHotRows | None

# Ones where a row of a use counts, for every group or for all alike; `None` where all rows do.
# Without a batch axis, all rows are one datum's.
Kept = Tensor | None
KeptOf = Callable[[Use], Kept]


@dataclass(frozen=True)
class Counted:
    """Σ_rows x xᵀ of one-hot rows: a diagonal, the number of times that each one occurs."""

    diagonal: Float[Tensor, " d_in"]


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


def input_moment(
    term: TermPlan, sharing: str, inputs: Inputs, outputs: Gradients, kept: KeptOf
) -> tuple[Tensor | Counted, int | Tensor]:
    """Σ_rows x̃ x̃ᵀ of a term over one batch, and its number of rows.

    Args:
        term: The term.
        sharing: `"expand"` or `"reduce"`; a bias by itself is not asked.
        inputs: The input of a use, as tapped.
        outputs: The output of a use, as tapped; for its shape.
        kept: Which rows of a use count.

    Returns:
        The sum of shape (group, in, in), or its diagonal for one-hot rows; the number of rows, of
        shape (group,) where groups have rows of their own.
    """
    if term.is_bias:
        y = outputs(term.uses[0])
        n = normal_y(term.uses[0], y, known(term.uses[0])).shape[1]
        return torch.full((1, 1, 1), n, dtype=accurate_dtype(y), device=y.device), n
    masks = [kept(u) for u in term.uses]
    at = [_layout(u, sharing, m) for u, m in zip(term.uses, masks, strict=True)]
    rows = [normal_x(u, inputs(u), b) for u, b in zip(term.uses, at, strict=True)]
    like = [normal_y(u, outputs(u), b) for u, b in zip(term.uses, at, strict=True)]
    total = _total(_rows(y, m) for y, m in zip(like, masks, strict=True))
    if sharing == "expand" and all(isinstance(r, OneHotRows) for r in rows):
        return _count(rows, like, masks), total
    dense = [
        _masked(_by_datum(_with_columns(term, k, _accurate(_dense(r, y)))), m)
        for k, (r, y, m) in enumerate(zip(rows, like, masks, strict=True))
    ]
    if sharing == "reduce":
        places = sum(_places(y, m) for y, m in zip(like, masks, strict=True))
        assert isinstance(places, Tensor)
        x = torch.cat(dense, dim=2).sum(2) / places.clamp_min(1).unsqueeze(-1)  # x̂ = mean_s x
        return x.mT @ x, _total([(places > 0).sum(-1)])
    x = torch.cat([d.flatten(1, 2) for d in dense], dim=1)
    return x.mT @ x, total


def _layout(use: Use, sharing: str, kept: Kept) -> BatchAxis | None:
    """The batch axis, where rows have to be told by their datum."""
    if sharing == "reduce":
        return known(use)
    return None if kept is None else use.batch


def _by_datum(x: Tensor) -> Float[Tensor, "group batch shared d"]:
    """Rows in whatever axes as rows of one datum."""
    return x if x.ndim == 4 else x.flatten(1, -2).unsqueeze(1)


def _masked(x: Float[Tensor, "group batch shared d"], kept: Kept) -> Tensor:
    return x if kept is None else x * kept.unsqueeze(-1).to(x.dtype)


def _rows(y: Tensor, kept: Kept) -> int | Tensor:
    """The number of rows of an output in normal form; of every group, where these differ."""
    return y.shape[1:-1].numel() if kept is None else kept.count_nonzero((1, 2))


def _total(numbers: Iterable[int | Tensor]) -> int | Tensor:
    """Their sum; one number where all groups have the same."""
    total = sum(numbers)
    return int(total) if isinstance(total, Tensor) and len(total) == 1 else total


def _places(y: Tensor, kept: Kept) -> Float[Tensor, "group batch"]:
    """The number of rows of every datum in an output in normal form."""
    if kept is None:
        return y.new_full((1, y.shape[1]), y.shape[2], dtype=accurate_dtype(y))
    return kept.to(accurate_dtype(y)).sum(2)


def output_moment(
    term: TermPlan, sharing: str, gradients: Gradients, kept: KeptOf
) -> Float[Tensor, "g o o"]:
    """Σ_rows g gᵀ of a term over one batch, for one backpropagated vector."""
    if term.is_bias:
        _require_formable(term)
        g = sum(_bias_gradient(term, u, gradients(u)) for u in term.uses)  # Σ_s g of every datum
        assert isinstance(g, Tensor)
        return (g.mT @ g).unsqueeze(0)
    parts = []
    for use in term.uses:
        mask = kept(use)
        y = normal_y(use, gradients(use), _layout(use, sharing, mask))
        parts.append(_masked(_by_datum(y), mask))
    if sharing == "reduce":
        g = _accurate(torch.cat(parts, dim=2)).sum(2)  # ĝ = Σ_s g
    else:
        g = _accurate(torch.cat([p.flatten(1, 2) for p in parts], dim=1))
    return g.mT @ g


LARGEST_BLOCK = 2**28  # numbers in the exact block of a bias: 1 GiB in float32


def _require_formable(term: TermPlan) -> None:
    numel = _bias_places(term, term.uses[0])[1]
    if numel**2 > LARGEST_BLOCK:
        raise FxkfacError(
            f"{', '.join(term.parameters)} is added to the data and has {numel:,} entries: its "
            f"exact block would hold {numel**2:,} numbers; expected at most {LARGEST_BLOCK:,}. "
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
            "axis. Use sharing='expand', which needs no batch axis, or select other parameters."
        )
    return use.batch


def _accurate(x: Tensor) -> Tensor:
    """Outer products and counts in half precision are ruined: float32 or better."""
    return x.to(accurate_dtype(x))


def accurate_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a tensor's products are summed: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def _dense(rows: Rows, y: Tensor) -> Tensor:
    """Rows with every row axis of the output, one-hot vectors written out."""
    assert rows is not None
    if isinstance(rows, OneHotRows):
        hot = rows.scale * F.one_hot(rows.indices, rows.size).to(y.dtype).unsqueeze(0)
        if rows.ignored is not None:
            hot[..., rows.ignored] = 0.0
        rows = hot
    return rows.expand(-1, *y.shape[1:-1], -1)


def _with_columns(term: TermPlan, place: int, x: Tensor) -> Tensor:
    """x̃ = (x 1): one column for each bias that has joined; zero where it is not added."""
    biases = [c.uses[place] for c in term.columns]
    scales = [u.join.scale if u and u.join else 0.0 for u in biases]
    ones = [x.new_full((*x.shape[:-1], 1), scale) for scale in scales]
    return torch.cat([x, *ones], dim=-1) if ones else x


def _count(rows: Sequence[Rows], like: Sequence[Tensor], kept: Sequence[Kept]) -> Counted:
    total: list[Tensor] = []
    for r, y, m in zip(rows, like, kept, strict=True):
        assert isinstance(r, OneHotRows)
        indices = r.indices.expand(y.shape[1:-1]).flatten()
        weights = None if m is None else m.flatten().to(accurate_dtype(y))
        counts = r.scale**2 * indices.bincount(weights, r.size).to(accurate_dtype(y))
        if r.ignored is not None:
            counts[r.ignored] = 0.0
        total.append(counts)
    return Counted(torch.stack(total).sum(0))


def _bias_gradient(term: TermPlan, use: Use, gradient: Tensor) -> Float[Tensor, "batch numel"]:
    """Every datum's gradient of a bias: Σ_s g, at the places of its entries."""
    g = _accurate(normal_y(use, gradient, known(use))).sum(2)  # (group, batch, out)
    flat = use.form.scale * g.movedim(0, 1).flatten(1)
    places, numel = _bias_places(term, use)
    return flat.new_zeros(len(flat), numel).index_add(1, places.to(flat.device), flat)


@lru_cache(maxsize=256)  # the same for every vector and every batch
def _bias_places(term: TermPlan, use: Use) -> tuple[Tensor, int]:
    """Where the entries of one use are among all that the term touches, and how many these are."""
    touched = term.touched()
    return torch.searchsorted(touched, normal_weight(use).flatten()), len(touched)
