"""Every datum's own gradient, from the taps -> exact diagonals and dense blocks.

    G_n = Σ_s x gᵀ        diag C = R Σ_n Σ_c G_n²        C = R Σ_n Σ_c vec(G_n) vec(G_n)ᵀ

The gradients of all uses of a parameter are summed before they are squared, so this is exact for
whatever weight sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.datum import Heard, rows_of
from fxkfac.curvature.plan import TermPlan
from fxkfac.curvature.sharing import summed_gradient
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, normal_weight
from fxkfac.linalg.rows import room
from fxkfac.precision import accurate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def exact_moment(
    name: str,
    structure: str,
    shape: tuple[int, ...],
    uses: Sequence[Use],
    inputs: Callable[[Use], Input],
    gradients: Callable[[Use], Tensor],
) -> Tensor:
    """Σ_n G_n² in the parameter's shape, or Σ_n vec(G_n) vec(G_n)ᵀ, for one vector."""
    total: Tensor | None = None
    for G in datum_gradients(name, uses, inputs, gradients):
        part = G.mT @ G if structure == "dense" else G.square().sum(0)
        total = part if total is None else total + part
    assert total is not None
    return total if structure == "dense" else total.view(shape)


def zero_moment(shape: tuple[int, ...], structure: str, like: Tensor) -> Tensor:
    """Where the sum over the data begins, for a parameter of this shape."""
    numel = torch.Size(shape).numel()
    shape = (numel, numel) if structure == "dense" else shape
    return like.new_zeros(shape, dtype=accurate_dtype(like))


def datum_gradients(
    name: str,
    uses: Sequence[Use],
    inputs: Callable[[Use], Input],
    gradients: Callable[[Use], Tensor],
) -> Iterator[Float[Tensor, "data numel"]]:
    """The gradients of some of the data after those of others."""
    largest = max(u.view.numel for u in uses)
    data = max(1, room() // max(largest, 1))
    each = [_of_use(name, u, inputs(u), gradients(u), data) for u in uses]
    for parts in zip(*each, strict=True):
        yield torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _of_use(name: str, use: Use, x: Input, g: Tensor, data: int) -> Iterator[Tensor]:
    """One use's part of every datum's gradient of one parameter, (n, numel)."""
    entries = normal_weight(use).flatten().to(g.device)
    sizes = [torch.Size(shape).numel() for shape in use.view.shapes]
    for G in _entries_of_use(use, x, g, data):
        flat = G.new_zeros(len(G), use.view.numel).index_add(1, entries, G)
        yield dict(zip(use.parameters, flat.split(sizes, dim=1), strict=True))[name]


def _entries_of_use(use: Use, x: Input, g: Tensor, data: int) -> Iterator[Tensor]:
    """(n, group · in · out), of so many data at a time."""
    if use.is_bias:
        yield from summed_gradient(use, g).split(data)
        return
    heard = Heard(use, (), x, g.unsqueeze(0), None)
    for rows in rows_of(TermPlan((use,)), [heard], data, 1, accurate_dtype(g), tokens=True):
        yield rows.formed().movedim(1, 0).flatten(1)
