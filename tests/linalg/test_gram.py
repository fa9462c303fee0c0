"""Symmetric products added up in place equal the plain ones, whatever the rows' strides."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from linalg.grams import empty, gram_of
from torch import Tensor

from fxkfac.linalg import Gram, add_gram, gram, products

SIZES = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.float64])

# Name -> memory of the given sizes, seen as (group, batch, shared, d).
VIEWS = {
    "contiguous": ((0, 1, 2, 3), "g n s d -> g n s d"),
    "channels of a gradient": ((1, 0, 3, 2), "n g d s -> g n s d"),
    "groups inside": ((1, 2, 0, 3), "n s g d -> g n s d"),
    "transposed rows": ((0, 3, 1, 2), "g d n s -> g n s d"),
    "d outermost": ((3, 2, 1, 0), "d s n g -> g n s d"),
}


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def plain(x: Tensor) -> Tensor:
    rows = x.flatten(1, -2)
    return rows.mT @ rows


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which four columns make two strips, and seven numbers a chunk."""
    monkeypatch.setattr(gram, "TILE", 3)
    for name, value in {"STRIP": 2, "WIDE": 7, "CHUNK": 7, "FEW": 3}.items():
        monkeypatch.setattr(products, name, value)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(actual, actual.mT, rtol=tolerance, atol=tolerance * scale)


@given(
    st.tuples(SIZES, st.integers(0, 5), SIZES, st.integers(1, 9)),
    st.sampled_from(sorted(VIEWS)),
    DTYPES,
    st.booleans(),
)
def test_products_of_any_view_are_the_plain_ones(
    sizes: tuple[int, int, int, int], view: str, dtype: torch.dtype, blocks: bool
) -> None:
    order, pattern = VIEWS[view]
    x = rearrange(rand(*(sizes[k] for k in order), dtype=dtype), pattern)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            small(patch)
        sums = empty(x.shape[0], x.shape[-1], x)
        add_gram(sums, x)
        add_gram(sums, x)
        close(sums.matrix(), 2 * plain(x))
        add_gram(sums, x.flatten(1, 2))  # goes on after it was read
        close(sums.matrix(), 3 * plain(x))


@given(SIZES, SIZES, SIZES, SIZES, st.booleans())
def test_expanded_and_sliced_rows(g: int, n: int, s: int, d: int, blocks: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            small(patch)
        views = [
            rand(g, 1, 1, d).expand(g, n, s, d),
            rand(1, n, s, d).expand(g, n, s, d),
            rand(g, n, s, 1).expand(g, n, s, d),
            rand(g, n, s + 1, 2 * d)[:, :, 1:, ::2],
            rand(g, n, s, d + 1)[..., 1:],
        ]
        for x in views:
            close(gram_of(x), plain(x))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("d", [191, 192, 500, 1000, 1601])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows_at_the_sizes_of_the_machine(d: int, group: int, dtype: torch.dtype) -> None:
    x = rand(group, 9, d, dtype=dtype)
    close(gram_of(x), plain(x))
    assert torch.equal(gram_of(x[:, :0]), x.new_zeros(group, d, d))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("d", [4, 400])
def test_a_total_may_be_part_of_something_larger(group: int, d: int) -> None:
    room, x = torch.zeros(group, d + 1, d + 1, dtype=torch.float64), rand(group, 5, d)
    sums = Gram(room[:, :d, :d])
    add_gram(sums, x)
    close(sums.matrix(), plain(x))
    assert torch.equal(room[:, :d, :d], sums.total)
    assert not room[:, d].any()
    assert not room[:, :, d].any()


@pytest.mark.parametrize("first", [0, 1, 9])
@pytest.mark.parametrize("second", [0, 1, 9])
def test_two_sums_together(first: int, second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    parts = [rand(2, rows, 5) for rows in (first, second)]
    mine, other = (empty(2, 5, x) for x in parts)
    for sums, x in zip((mine, other), parts, strict=True):
        add_gram(sums, x)
    mine.merge(other)
    close(mine.matrix(), plain(torch.cat(parts, 1)))


def test_half_precision_is_summed_in_float32() -> None:
    x = rand(1, 6, 50, 4).to(torch.bfloat16)
    total = gram_of(x)
    assert total.dtype == torch.float32
    close(total, plain(x.float()))
