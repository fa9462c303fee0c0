"""Taps of a term -> rows of A and rows of B, by expand or reduce (Eschenhagen et al. 2023).

    expand:  A = Σ_rows x xᵀ               B = Σ_rows g gᵀ           every row by itself
    reduce:  A = Σ_n x̂ x̂ᵀ, x̂ = mean_s x    B = Σ_n ĝ ĝᵀ, ĝ = Σ_s g   one row per datum

The uses of a term are one more shared axis. A bias by itself has one row per datum, always: its
gradient is Σ_s g, so that its block is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxkfac.curvature.plan import TermPlan
from fxkfac.errors import BatchAxisError, FxkfacError
from fxkfac.graph.ir import BatchAxis, Use
from fxkfac.graph.normal import OneHotRows, normal_weight, normal_x, normal_y

if TYPE_CHECKING:
    from jaxtyping import Float

SHARINGS = ("expand", "reduce")

Inputs = Callable[[Use], Tensor | None]
Gradients = Callable[[Use], Tensor]
Kept = Callable[[Use, Tensor], Tensor | None]
Rows = Tensor | OneHotRows | None


@dataclass(frozen=True)
class Counted:
    """Σ_rows x xᵀ of one-hot rows: a diagonal, the number of times that each one occurs."""

    diagonal: Float[Tensor, " d_in"]


def input_moment(
    term: TermPlan, sharing: str, inputs: Inputs, outputs: Gradients, kept: Kept
) -> tuple[Tensor | Counted, int]:
    """Σ_rows x̃ x̃ᵀ of a term over one batch, and its number of rows.

    Args:
        term: The term.
        sharing: `"expand"` or `"reduce"`; a bias by itself is not asked.
        inputs: The input of a use, as tapped.
        outputs: The output of a use, as tapped; for its shape.
        kept: Which rows of a use are no padding, given its output.

    Returns:
        The sum of shape (group, in, in), or its diagonal for one-hot rows; the number of rows.
    """
    if term.is_bias:
        y = outputs(term.uses[0])
        n = normal_y(term.uses[0], y, known(term.uses[0])).shape[1]
        return torch.full((1, 1, 1), n, dtype=accurate_dtype(y), device=y.device), n
    real = [kept(u, outputs(u)) for u in term.uses]
    at = [
        known(u) if sharing == "reduce" or m is not None else None
        for u, m in zip(term.uses, real, strict=True)
    ]
    rows = [normal_x(u, inputs(u), b) for u, b in zip(term.uses, at, strict=True)]
    like = [normal_y(u, outputs(u), b) for u, b in zip(term.uses, at, strict=True)]
    total = sum(
        y.shape[1:-1].numel() if m is None else int(m.count_nonzero())
        for y, m in zip(like, real, strict=True)
    )
    if sharing == "expand" and all(isinstance(r, OneHotRows) for r in rows):
        return _count(rows, like, real), total
    dense = [
        _with_columns(term, k, _accurate(_dense(r, y)))
        for k, (r, y) in enumerate(zip(rows, like, strict=True))
    ]
    dense = [
        x if m is None else x * m.unsqueeze(-1).to(x.dtype)
        for x, m in zip(dense, real, strict=True)
    ]
    if sharing == "reduce":
        places = sum(_places(y, m) for y, m in zip(like, real, strict=True))
        assert isinstance(places, Tensor)
        x = torch.cat(dense, dim=2).sum(2) / places.clamp_min(1).unsqueeze(-1)  # x̂ = mean_s x
        return x.mT @ x, int((places > 0).sum())
    x = torch.cat([d.flatten(1, -2) for d in dense], dim=1)
    return x.mT @ x, total


def _places(y: Tensor, real: Tensor | None) -> Float[Tensor, " batch"]:
    """The number of rows of every datum in an output in normal form."""
    if real is None:
        return y.new_full(y.shape[1:2], y.shape[2], dtype=accurate_dtype(y))
    return real.to(accurate_dtype(y)).sum(1)


def output_moment(
    term: TermPlan, sharing: str, gradients: Gradients, kept: Kept
) -> Float[Tensor, "g o o"]:
    """Σ_rows g gᵀ of a term over one batch, for one backpropagated vector."""
    if term.is_bias:
        _require_formable(term)
        g = sum(_bias_gradient(term, u, gradients(u)) for u in term.uses)  # Σ_s g of every datum
        assert isinstance(g, Tensor)
        return (g.mT @ g).unsqueeze(0)
    parts = [_real_gradient(u, gradients(u), sharing, kept) for u in term.uses]
    if sharing == "reduce":
        g = _accurate(torch.cat(parts, dim=2)).sum(2)  # ĝ = Σ_s g
    else:
        g = _accurate(torch.cat([p.flatten(1, -2) for p in parts], dim=1))
    return g.mT @ g


def _real_gradient(use: Use, gradient: Tensor, sharing: str, kept: Kept) -> Tensor:
    """The gradient of a use in normal form, zero in the rows that are padding."""
    real = kept(use, gradient)
    if real is not None:
        return normal_y(use, gradient, known(use)) * real.unsqueeze(-1).to(gradient.dtype)
    return normal_y(use, gradient, known(use) if sharing == "reduce" else None)


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


def _count(rows: Sequence[Rows], like: Sequence[Tensor], real: Sequence[Tensor | None]) -> Counted:
    total: list[Tensor] = []
    for r, y, m in zip(rows, like, real, strict=True):
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
