"""Every datum's own gradient, from the taps -> exact diagonals and dense blocks.

    G_n = Σ_s x gᵀ        diag C = R Σ_n Σ_c G_n²        C = R Σ_n Σ_c vec(G_n) vec(G_n)ᵀ

The gradients of all uses of a parameter are summed before they are squared, so this is exact for
whatever weight sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxkfac.curvature.sharing import accurate_dtype, known
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Input, OneHotRows, normal_weight, normal_x, normal_y
from fxkfac.graph.program import Program, Tapped
from fxkfac.graph.structure import EXACT

LARGEST_CHUNK = 2**24  # numbers in the gradients that are held at once


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


def exact_names(
    program: Program, tapped: Tapped, structures: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Parameters with exact blocks: those whose taps tell each datum's gradient, and the others.

    One that nothing uses is neither: its block is zero. Where the data are coupled, no gradient is
    one datum's own. The other way looks whether they are, and refuses that; a scale that nobody
    asked an exact block for is taken as everything in KFAC then is.
    """
    names = [name for name, kind in structures.items() if kind in EXACT]
    used = {p for u in tapped.uses for p in u.parameters}
    unknown = {p for u in tapped.uses if u.batch is None for p in u.parameters}
    names = [name for name in names if name in used or name in tapped.uncovered]
    lost = unknown | set(tapped.uncovered)
    if tapped.coupled or tapped.alike:
        chosen = program.structures_for(tapped)
        lost |= {name for name in names if not chosen[name].is_scale}
    return [n for n in names if n not in lost], [n for n in names if n in lost]


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
) -> Iterator[Tensor]:
    """(chunk, numel): the gradients of some of the data after those of others."""
    gs = [normal_y(u, gradients(u), known(u)) for u in uses]
    xs = [normal_x(u, inputs(u), known(u)) for u in uses]
    n = gs[0].shape[1]
    largest = max(u.view.numel for u in uses)
    chunk = max(1, LARGEST_CHUNK // max(largest, 1))
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        parts = [
            _own(name, u, _some(x, start, size), g.narrow(1, start, size))
            for u, x, g in zip(uses, xs, gs, strict=True)
        ]
        yield torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _some(x: Tensor | OneHotRows | None, start: int, size: int) -> Tensor | OneHotRows | None:
    """The rows of some of the data; an input that is the same for all data stays as it is."""
    if isinstance(x, OneHotRows):
        if x.indices.shape[0] == 1:
            return x
        return OneHotRows(x.indices.narrow(0, start, size), x.size, x.ignored, x.scale)
    return x if x is None or x.shape[1] == 1 else x.narrow(1, start, size)


def _own(name: str, use: Use, x: Tensor | OneHotRows | None, g: Tensor) -> Tensor:
    """One use's part of every datum's gradient of one parameter, (n, numel)."""
    g = g.to(accurate_dtype(g))
    groups, n, shared, out = g.shape
    if isinstance(x, OneHotRows):
        at = x.indices.expand(n, shared)
        if x.ignored is not None:
            g = g * (at != x.ignored).unsqueeze(-1)
        G = g.new_zeros(n, x.size, out)
        G = G.scatter_add(1, at.unsqueeze(-1).expand(n, shared, out), x.scale * g[0])
    elif x is None:
        G = use.form.scale * g.sum(2).movedim(0, 1)
    else:
        groups = max(groups, len(x))
        x = x.to(g.dtype).expand(groups, n, shared, -1)
        G = torch.einsum("gnsi,gnso->ngio", x, g.expand(groups, -1, -1, -1))
    entries = normal_weight(use).flatten().to(g.device)
    flat = g.new_zeros(n, use.view.numel).index_add(1, entries, G.flatten(1))
    sizes = [torch.Size(shape).numel() for shape in use.view.shapes]
    return dict(zip(use.parameters, flat.split(sizes, dim=1), strict=True))[name]
