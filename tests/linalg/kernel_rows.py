"""Rows that kernels of our own sum, and what their sums are."""

from __future__ import annotations

import pytest
import torch
from drawn import rand
from torch import Tensor

from fxkfac.linalg import places, tiles

F32, F64 = torch.float32, torch.float64

KERNEL = tiles.kernel_of(F32)
PLAIN = {"scale": 1.0, "adds": False}
has_digits = pytest.mark.skipif(
    KERNEL is None or KERNEL.functions.digits is None, reason="this processor has no tiles of bytes"
)

# Rows and columns, or what has them in its first axes and the last ones.
ROWS = {
    "panels and pieces": (rand(256, 128), 1),
    "a part more, many columns": (rand(1030, 700), 1),
    "many columns in whole lines": (rand(300, 736), 1),
    "one column more": (rand(300, 97), 1),
    "less than half a panel more": (rand(131, 205), 1),
    "one row more": (rand(129, 112), 1),
    "columns that lie apart": (rand(400, 2, 130)[:, 1, ::2].repeat(1, 2), 1),
    "every third row": (rand(900, 150)[::3], 1),
    "every other column": (rand(260, 330)[:, ::2], 1),
    "columns first": (rand(140, 1001).T, 1),
    "columns first, a few rows together": (rand(160, 30, 12)[..., :8].movedim(0, 2), 1),
    "columns first, three rows together": (rand(160, 90, 5)[..., :3].movedim(0, 2), 1),
    "the same row": (rand(1, 100).expand(500, 100), 1),
    "patches": (rand(3, 16, 14, 14).unfold(2, 3, 1).unfold(3, 3, 1).movedim(1, 3), 3),
    "patches, few together": (rand(9, 16, 8, 8).unfold(2, 3, 1).unfold(3, 3, 1).movedim(1, 3), 3),
    "patches with strides": (rand(9, 16, 19, 19).unfold(2, 3, 2).unfold(3, 3, 2).movedim(1, 3), 3),
}


def plain(x: Tensor, columns: int = 1) -> Tensor:
    """The sum in double precision."""
    rows = x.double().flatten(-columns).flatten(0, -2)
    return rows.T @ rows


def layout(x: Tensor, columns: int) -> places.Layout:
    """Where rows and columns are, without a group."""
    down, across = (
        places.places_of(tuple(zip(x.shape[part], x.stride()[part], strict=True)))
        for part in (slice(None, -columns), slice(-columns, None))
    )
    return places.Layout(down, across)


def check_sums(sums: Tensor, x: Tensor, columns: int, rows: int, more: float = 0.0) -> None:
    """Σ x of the first rows, and more, and nothing behind them."""
    x = x.flatten(-columns).flatten(0, -2)[:rows].double()
    assert bool(((sums[:-1] - x.sum(0) - more).abs() <= 1e-6 * (x.abs().sum(0) + more)).all())
    assert sums[-1].isnan()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def in_single(x: Tensor) -> Tensor:
    """The same view of the same memory, in single precision."""
    memory = x.as_strided((x.untyped_storage().nbytes() // 8,), (1,), 0).float()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())
