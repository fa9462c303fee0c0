"""Kernels of our own: by vectors, and by tiles of bytes, which are as exact as float32."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isnan, nan

import pytest
import torch
from drawn import rand
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxkfac.linalg import Gram, add_gram, products, tiles

F32, F64 = torch.float32, torch.float64

KERNEL = tiles._kernels().get(F32)
PLAIN = {"scale": 1.0, "adds": False}
has_digits = pytest.mark.skipif(
    KERNEL is None or KERNEL.digits is None, reason="this processor has no tiles of bytes"
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


def by_digits(x: Tensor, columns: int, threads: int, total: Tensor | None = None) -> Tensor:
    """Half of the sum by that kernel, added to a total."""
    d = x.shape[-columns:].numel()
    adds, total = total is not None, torch.full((d, d), nan) if total is None else total
    assert run_digits(x, columns, threads, total, adds=adds) == x.numel() // d
    return total


def given(x: Tensor, columns: int) -> tiles.Matrix:
    """Where rows and columns are, without a group."""
    down, across = (
        tiles._places(tuple(zip(x.shape[part], x.stride()[part], strict=True)))
        for part in (slice(None, -columns), slice(-columns, None))
    )
    return tiles.Matrix(x.data_ptr(), down, across)


def check_sums(sums: Tensor, x: Tensor, columns: int, rows: int, more: float = 0.0) -> None:
    """Σ x of the first rows, and more, and nothing behind them."""
    x = x.flatten(-columns).flatten(0, -2)[:rows].double()
    assert bool(((sums[:-1] - x.sum(0) - more).abs() <= 1e-6 * (x.abs().sum(0) + more)).all())
    assert sums[-1].isnan()


def run_digits(x: Tensor, columns: int, threads: int, total: Tensor, *, adds: bool) -> int:
    """How many rows are added to a total; none of the kernel's memory is read before."""
    _, (_, _, rows), (_, _, d) = at = given(x, columns)
    digits, sums = KERNEL.digits, torch.full((d + 1,), nan)
    room = torch.full((digits.room(rows, d, threads),), 255, dtype=torch.uint8)
    to = total.data_ptr(), total.stride(0), 0.5, adds
    done = digits.run(*to, *at.given(), sums.data_ptr(), room.data_ptr(), threads)
    if done:
        check_sums(sums, x, columns, done)
    return done


def by_vectors(
    x: Tensor, columns: int, threads: int, total: Tensor, *, adds: bool = False, more: float = nan
) -> float:
    """The trace of a total to which half of the sum was added; no memory is read before.

    Sums of columns are added to a number, if one is given.
    """
    _, (_, _, rows), (_, _, d) = at = given(x, columns)
    kernel, sums = tiles._kernels()[x.dtype], x.new_full((d + 1,), more)
    numbers = kernel.room(rows, d, threads)
    room = x.new_full((numbers + 99,), nan)
    to, adds_sums = (total.data_ptr(), total.stride(0), 0.5, adds), not isnan(more)
    trace = kernel.run(*to, *at.given(), sums.data_ptr(), adds_sums, room.data_ptr(), threads)
    assert bool(room[numbers:].isnan().all())
    if adds_sums:
        assert sums[-1] == more
        sums[-1] = nan
    else:
        more = 0.0
    check_sums(sums, x, columns, rows, more)
    return trace


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@has_digits
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("x", "columns"), ROWS.values(), ids=ROWS)
def test_digits_are_as_exact_as_single_precision(x: Tensor, columns: int, threads: int) -> None:
    x = x.float() if x.is_contiguous() else _single(x)
    expected, found = 0.5 * plain(x, columns), by_digits(x, columns, threads)
    assert torch.equal(found, found.T)
    rows = x.flatten(-columns).flatten(0, -2)
    assert error(found, expected) < 2 * error(0.5 * rows.T @ rows, expected)
    more = by_digits(x, columns, threads, found.clone())
    assert error(more, 2 * found.double()) < 1e-7
    assert torch.equal(more, more.T)


def _single(x: Tensor) -> Tensor:
    """The same view of the same memory, in single precision."""
    memory = x.as_strided((x.untyped_storage().nbytes() // 8,), (1,), 0).float()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


@has_digits
def test_many_rows_are_no_less_exact() -> None:
    x = 1 + rand(40_000, 96).float()
    assert error(by_digits(x, 1, 1), 0.5 * plain(x)) < 5e-7  # one sum of all rows: 4e-6


@pytest.mark.parametrize("d", [96, 1500])
def test_many_rows_are_no_less_exact_by_vectors(d: int) -> None:
    x = 1 + rand(20_000, 96).float()[:, torch.arange(d) % 96]
    by_vectors(x, 1, 1, found := x.new_empty(d, d))
    assert error(found, 0.5 * plain(x)) < 5e-7


@has_digits
def test_products_of_all_digits_count() -> None:
    number = 1 + 127 * 2.0**-14 + 127 * 2.0**-22  # its digits
    found = by_digits(torch.full((128, 96), number), 1, 1).double()
    assert float((found / (64 * number**2) - 1).abs().max()) < 2.0**-23


@has_digits
def test_digits_are_as_exact_as_columns_are_large() -> None:
    x = rand(700, 130).float()
    x *= torch.logspace(-12, 9, 130)
    x[::50] *= 1e4
    expected = 0.5 * plain(x)
    sizes = expected.diagonal().sqrt()
    off = (by_digits(x, 1, 2) - expected).abs() / (sizes.unsqueeze(1) * sizes)
    assert float(off.max()) < 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("columns", [slice(64, None), slice(5, 6), slice(None)])
@pytest.mark.parametrize("number", [1e-19, 1e-16, 1e-14, 0.0, 1.8446e19, 2e38, inf, nan])
def test_numbers_without_digits_are_summed_all_the_same(
    number: float, columns: slice, dtype: torch.dtype
) -> None:
    for x in (rand(1, 1024, 128).to(dtype), rand(1, 128, 1024).to(dtype).mT):
        x[:, slice(300, 301) if number > 1 else slice(None), columns] *= number
        sums = Gram(torch.empty(1, 128, 128, dtype=dtype))
        add_gram(sums, x)
        found, rounding = sums.matrix(), torch.finfo(dtype).eps
        expected, sizes = x.mT @ x, x.abs().mT @ x.abs()
        overflows = ~expected.isfinite()
        assert torch.equal(found[overflows].isnan(), expected[overflows].isnan())
        off = (found - expected)[~overflows].abs()
        assert bool((off <= 20 * rounding * sizes[~overflows] + 1e-43).all())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_strips_and_kernels_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(2, 700, 200).to(dtype)
    sums = Gram(torch.full((2, 200, 200), nan, dtype=dtype), scale=0.25)
    monkeypatch.setattr(products, "FEW", 0)
    for has_one in (False, True, True, False, True):
        with monkeypatch.context() as patch:
            if not has_one:
                patch.setattr(tiles, "_kernels", dict)
            add_gram(sums, x)
    for scale in (0.1, 1.0):
        found, expected = sums.matrix(scale), 5 * scale * x.double().mT @ x.double()
        assert error(found, expected) < (1e-6 if dtype == F32 else 1e-14)


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
        x = x.float() if x.is_contiguous() else _single(x)
    expected, d = 0.5 * plain(x, columns), x.shape[-columns:].numel()
    found, tolerance = torch.full((d, d), nan, dtype=dtype), 2e-6 if dtype == F32 else 1e-14
    trace = by_vectors(x, columns, threads, found)
    assert error(found, expected) < tolerance
    assert torch.equal(found, found.T)
    assert trace == pytest.approx(float(found.double().trace()), rel=1e-4)
    by_vectors(x, columns, threads, found, adds=True, more=1.0)
    assert error(found, 2 * expected) < tolerance
    assert torch.equal(found, found.T)


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
        assert not tiles._kernels()[dtype].add(total, wrong[None], **PLAIN).are_finite
    assert tiles._kernels()[dtype].add(x.new_empty(1, d, d), x[None], **PLAIN).are_finite


def test_there_is_a_kernel_for_wide_sums_alone():
    sizes = [(1, 700, 48), (1, 700, 47), (1, 64, 512), (1, 63, 600), (1, 128, 255), (2, 64, 512)]
    of = [rand(*size) for size in sizes]
    kinds = [kernel_for(x) for x in (*of, of[0].float(), of[0].half(), of[0][:, :0])]
    expected = [True, False, True, False, False, True, True, False, False]
    assert [kind is not None for kind in kinds] == expected


def test_what_would_be_copied_goes_to_a_kernel_for_less() -> None:
    kinds = [kernel_for(rand(*size), copied=True) for size in [(1, 3, 16), (1, 99, 15), (1, 0, 16)]]
    assert [kind is not None for kind in kinds] == [True, False, False]


def kernel_for(x: Tensor, **options: bool) -> tiles.Kernel | None:
    """The one for the sum of these rows."""
    return tiles.kernel_for(x.mT @ x, x, x.shape[1], **options)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("part", [slice(None), slice(300)])
def test_the_sum_of_rows_comes_with_their_products(part: slice, dtype: torch.dtype) -> None:
    x = rand(3, 1100, 4, 60).to(dtype)[:, part].transpose(1, 2)
    x[1, 3, 290:, 7] = 2.0**60  # without digits from there on
    for kinds in (x, x.flatten(1, 2), torch.cat([x, x], -1)):
        sums = Gram(torch.full((3, kinds.shape[-1], kinds.shape[-1]), nan, dtype=dtype))
        found = add_gram(sums, kinds, summed=True)
        rows = kinds.flatten(1, -2).double()
        assert bool(((found - rows.sum(1)).abs() <= 1e-6 * rows.abs().sum(1)).all())
        assert add_gram(sums, kinds) is None


def test_columns_may_share_memory_and_lie_apart():
    x = rand(1, 30, 48)[..., ::47].unsqueeze(-1).expand(1, 30, 2, 48)  # 0, .., 0, 47, .., 47
    total, rows = x.new_empty(1, 96, 96), x.flatten(2)
    tiles._kernels()[F64].add(total, x, 2, **PLAIN)
    torch.testing.assert_close(total, rows.mT @ rows)


def test_what_only_stands_for_numbers_has_no_kernel() -> None:
    total, x = torch.empty(1, 96, 96), rand(1, 400, 96).float()
    assert tiles.kernel_for(total, x, 400) is KERNEL
    assert tiles.kernel_for(total.mT, x, 400) is None
    assert tiles.kernel_for(total, torch._efficientzerotensor(1, 400, 96), 400) is None
    assert tiles.kernel_for(total, x.clone().requires_grad_(), 400) is None
    seen = []
    torch.vmap(lambda row: seen.append(tiles.kernel_for(total, row, 400)) or row)(x[0].unsqueeze(1))
    assert seen == [None]


def test_a_transform_has_operations() -> None:
    x, sums = rand(1, 300, 128), Gram(torch.empty(1, 128, 128, dtype=F64))

    def function(w: Tensor) -> Tensor:
        add_gram(sums, x)
        return w.sum()

    torch.func.grad(function)(torch.ones(2))
    torch.testing.assert_close(sums.matrix(), x.mT @ x)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_recorded_graph_has_operations(mode: str) -> None:
    def matrix(x: Tensor) -> Tensor:
        sums = Gram(x.new_empty(1, 128, 128))
        add_gram(sums, x)
        return sums.matrix()

    x = rand(2, 300, 128)
    recorded = make_fx(matrix, tracing_mode=mode)(x[:1])
    torch.testing.assert_close(recorded(x[1:]), matrix(x[1:]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert matrix(x[:1]).shape == (1, 128, 128)
    compiled = torch.compile(matrix, backend="eager")
    torch.testing.assert_close(compiled(x[1:]), matrix(x[1:]))


@has_digits
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "d", "step"), [(300, 640, 848), (1100, 736, 768), (300, 736, 751), (600, 20, 33)]
)
def test_what_lies_beside_a_sum_stays(rows: int, d: int, step: int, threads: int) -> None:
    x, beside = rand(rows, d).float(), torch.full((d, step), 7.0)
    assert run_digits(x, 1, threads, beside[:, :d], adds=False) == rows
    assert error(beside[:, :d], 0.5 * plain(x)) < 5e-7
    assert bool((beside[:, d:] == 7).all())


@has_digits
@pytest.mark.parametrize("power", [-100, -99, -1, 0, 1, 48, 49])
@pytest.mark.parametrize("mantissa", [1.0, 2 - 2.0**-6 - 2.0**-23, 2 - 2.0**-6, 2 - 2.0**-23])
def test_the_largest_number_of_a_column_has_digits(power: int, mantissa: float) -> None:
    x = mantissa * (-1.0) ** torch.arange(64).unsqueeze(1) * torch.ones(96)
    x[:, :95] *= 2.0 ** min(49, -power)
    x[:, 95] *= 2.0**power
    found, expected = by_digits(x, 1, 1)[:95].double(), 0.5 * plain(x)[:95]
    assert float((found / expected - 1).abs().max()) < 3e-7


@has_digits
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("number", [2.0**-101, -(2.0**50), inf, nan])
@pytest.mark.parametrize(("rows", "d", "done"), [(1030, 100, 1024), (1000, 100, 0), (900, 650, 0)])
def test_all_threads_end_where_one_does(
    rows: int, d: int, done: int, number: float, threads: int
) -> None:
    x, total = rand(rows, d).float(), torch.zeros(d, d)
    x[done:, 99] = number
    for _ in range(20):  # threads come in another order each time
        expected = 0 if threads > 1 and d == 100 else done  # by rows: all or none
        assert run_digits(x, 1, threads, total, adds=True) == expected
    sums = 10 * plain(x[:expected])
    assert float((total - sums).norm()) <= 1e-6 * float(sums.norm())


def test_vectors_go_on_where_digits_end() -> None:
    plain_kernel, x = tiles._kernels()[F32], rand(2, 900, 128).float()

    def of_some(*of: int) -> int:
        *given, number, columns, d, sums, _, threads = of
        room = torch.empty(plain_kernel.room(number, d, threads))
        plain_kernel.run(*given, 100, columns, d, sums, False, room.data_ptr(), threads)
        return 100

    kernel = replace(plain_kernel, digits=tiles.Digits(of_some, lambda *_: 1))
    total = torch.full((2, 128, 128), nan)
    added = kernel.add(total, x, scale=0.5, adds=False, summed=True)
    for found, sums, rows in zip(total, added.sums, x, strict=True):
        assert error(found, 0.5 * plain(rows)) < 1e-6
        torch.testing.assert_close(sums, rows.sum(0), rtol=1e-5, atol=1e-4)


@has_digits
@pytest.mark.parametrize("adds", [False, True])
def test_digits_end_where_a_number_has_none(adds: bool) -> None:
    x = rand(1, 2100, 640).float()
    x[0, 1500, 600] = 2.0**60
    sums = Gram(torch.full((1, 640, 640), nan))
    if adds:
        add_gram(sums, x[:, :700])
    add_gram(sums, x)
    rows = torch.cat([x[0, :700], x[0]]) if adds else x[0]
    found, expected = sums.matrix()[0].double(), plain(rows)
    sizes = rows.double().abs().T @ rows.double().abs()
    assert bool(((found - expected).abs() <= 3e-6 * sizes).all())


def test_few_numbers_are_not_split() -> None:
    digits = tiles.Digits(lambda *_: 0, lambda *_: 0)
    kernel = tiles.Kernel(lambda *_: 0.0, lambda *_: 0, F32, digits)
    sizes = [(512, 128), (511, 128), (64, 1024), (1, 5000), (1024, 64), (1100, 63)]
    assert [kernel.takes_digits(*of) for of in sizes] == [True, False, True, False, True, False]
    assert not tiles.Kernel(lambda *_: 0.0, lambda *_: 0, F32).takes_digits(512, 128)
