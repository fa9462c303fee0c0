"""The kernel by vectors, which takes any rows."""

from __future__ import annotations

from math import inf, isnan, nan

import pytest
import torch
from drawn import rand
from kernel_rows import F32, F64, PLAIN, ROWS, check_sums, error, in_single, layout, plain
from torch import Tensor

from fxkfac.linalg import tiles
from fxkfac.linalg.library import Function

pytestmark = pytest.mark.skipif(tiles.kernel_of(F32) is None, reason="no C++ compiler")


def by_vectors(
    x: Tensor, columns: int, threads: int, total: Tensor, *, adds: bool = False, more: float = nan
) -> float:
    """The trace of a total to which half of the sum was added; no memory is read before.

    Sums of columns are added to a number, if one is given.
    """
    (_, _, rows), (_, _, d) = lies = layout(x, columns)
    kernel, sums = tiles.kernel_of(x.dtype).functions.rows, x.new_full((d + 1,), more)
    numbers = kernel.room(rows, d, threads)
    room = x.new_full((numbers + 99,), nan)
    to, adds_sums = (total.data_ptr(), total.stride(0), 0.5, adds), not isnan(more)
    trace = kernel.run(
        *to, *lies.at(x.data_ptr()), sums.data_ptr(), adds_sums, room.data_ptr(), threads
    )
    assert bool(room[numbers:].isnan().all())
    if adds_sums:
        assert sums[-1] == more
        sums[-1] = nan
    else:
        more = 0.0
    check_sums(sums, x, columns, rows, more)
    return trace


VECTORS = {
    **ROWS,
    "tall and narrow": (rand(1500, 50), 1),
    "tall, in several blocks of panels": (rand(700, 500), 1),
    "one row": (rand(1, 200), 1),
    "one column": (rand(700, 1), 1),
    "more panels than a block": (rand(90, 330), 1),
    "larger than the cache": (rand(70, 737), 1),
    "in several chunks": (rand(5000, 20).repeat(1, 40), 1),
    "columns first, in parts of a vector": (rand(30, 130).T[3:], 1),
    "few columns apart": (rand(300, 7, 9)[..., ::4].movedim(1, 2), 1),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("x", "columns"), VECTORS.values(), ids=VECTORS)
def test_vectors_take_any_rows(x: Tensor, columns: int, threads: int, dtype: torch.dtype) -> None:
    if dtype == F32:
        x = x.float() if x.is_contiguous() else in_single(x)
    expected, d = 0.5 * plain(x, columns), x.shape[-columns:].numel()
    found, tolerance = torch.full((d, d), nan, dtype=dtype), 2e-6 if dtype == F32 else 1e-14
    trace = by_vectors(x, columns, threads, found)
    assert error(found, expected) < tolerance
    assert torch.equal(found, found.T)
    assert trace == pytest.approx(float(found.double().trace()), rel=1e-4)
    by_vectors(x, columns, threads, found, adds=True, more=1.0)
    assert error(found, 2 * expected) < tolerance
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("d", [96, 1500])
def test_many_rows_are_no_less_exact_by_vectors(d: int) -> None:
    x = 1 + rand(20_000, 96).float()[:, torch.arange(d) % 96]
    by_vectors(x, 1, 1, found := x.new_empty(d, d))
    assert error(found, 0.5 * plain(x)) < 5e-7


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "d", "step"), [(300, 640, 848), (90, 736, 768), (90, 736, 751), (600, 20, 33)]
)
def test_vectors_leave_what_lies_beside_a_sum(
    rows: int, d: int, step: int, threads: int, dtype: torch.dtype
) -> None:
    x, beside = rand(rows, d).to(dtype), torch.full((d, step), 7.0, dtype=dtype)
    by_vectors(x, 1, threads, beside[:, :d])
    assert error(beside[:, :d], 0.5 * plain(x)) < 1e-6
    assert bool((beside[:, d:] == 7).all())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("number", [inf, -inf, nan, None])
@pytest.mark.parametrize(("rows", "d"), [(600, 100), (70, 700)])
def test_the_trace_tells_of_what_is_no_number(
    rows: int, d: int, number: float | None, dtype: torch.dtype
) -> None:
    x, large = rand(rows, d).to(dtype), torch.finfo(dtype).max ** 0.6
    for row, column in ((0, 0), (rows - 1, d - 1), (rows // 2, 33)):
        wrong = x.clone()
        wrong[row, column] = large if number is None else number
        total = x.new_empty(1, d, d)
        assert not tiles.kernel_of(dtype).add(total, x=wrong[None], **PLAIN).are_finite
    assert tiles.kernel_of(dtype).add(x.new_empty(1, d, d), x=x[None], **PLAIN).are_finite


def test_vectors_go_on_where_digits_end() -> None:
    functions, x = tiles.kernel_of(F32).functions, rand(2, 900, 128).float()

    def of_some(*of: int) -> int:
        *given, number, columns, d, sums, _, threads = of
        room = torch.empty(functions.rows.room(number, d, threads))
        functions.rows.run(*given, 100, columns, d, sums, False, room.data_ptr(), threads)
        return 100

    with_digits = functions._replace(digits=Function(of_some, lambda *_: 1))
    kernel = tiles.Kernel(F32, with_digits)
    total = torch.full((2, 128, 128), nan)
    added = kernel.add(total, 0.5, False, x=x, summed=True)
    for found, sums, rows in zip(total, added.sums, x, strict=True):
        assert error(found, 0.5 * plain(rows)) < 1e-6
        torch.testing.assert_close(sums, rows.sum(0), rtol=1e-5, atol=1e-4)
