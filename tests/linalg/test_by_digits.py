"""The kernel by tiles of bytes, which is as exact as float32."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from drawn import rand
from kernel_rows import F32, KERNEL, ROWS, check_sums, error, has_digits, in_single, layout, plain
from torch import Tensor

from fxkfac.linalg import Gram, add_gram, tiles
from fxkfac.linalg.library import Function, Functions


def by_digits(x: Tensor, columns: int, threads: int, total: Tensor | None = None) -> Tensor:
    """Half of the sum by that kernel, added to a total."""
    d = x.shape[-columns:].numel()
    adds, total = total is not None, torch.full((d, d), nan) if total is None else total
    assert run_digits(x, columns, threads, total, adds=adds) == x.numel() // d
    return total


def run_digits(x: Tensor, columns: int, threads: int, total: Tensor, *, adds: bool) -> int:
    """How many rows are added to a total; none of the kernel's memory is read before."""
    (_, _, rows), (_, _, d) = lies = layout(x, columns)
    digits, sums = KERNEL.functions.digits, torch.full((d + 1,), nan)
    room = torch.full((digits.room(rows, d, threads),), 255, dtype=torch.uint8)
    to = total.data_ptr(), total.stride(0), 0.5, adds
    done = digits.run(*to, *lies.at(x.data_ptr()), sums.data_ptr(), room.data_ptr(), threads)
    if done:
        check_sums(sums, x, columns, done)
    return done


@has_digits
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("x", "columns"), ROWS.values(), ids=ROWS)
def test_digits_are_as_exact_as_single_precision(x: Tensor, columns: int, threads: int) -> None:
    x = x.float() if x.is_contiguous() else in_single(x)
    expected, found = 0.5 * plain(x, columns), by_digits(x, columns, threads)
    assert torch.equal(found, found.T)
    rows = x.flatten(-columns).flatten(0, -2)
    assert error(found, expected) < 2 * error(0.5 * rows.T @ rows, expected)
    more = by_digits(x, columns, threads, found.clone())
    assert error(more, 2 * found.double()) < 1e-7
    assert torch.equal(more, more.T)


@has_digits
def test_many_rows_are_no_less_exact() -> None:
    x = 1 + rand(40_000, 96).float()
    assert error(by_digits(x, 1, 1), 0.5 * plain(x)) < 5e-7  # one sum of all rows: 4e-6


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
    none = Function(lambda *_: 0, lambda *_: 0)
    kernel = tiles.Kernel(F32, Functions(none, none, none))
    sizes = [(512, 128), (511, 128), (64, 1024), (1, 5000), (1024, 64), (1100, 63)]
    assert [kernel.takes_digits(*of) for of in sizes] == [True, False, True, False, True, False]
    assert kernel.pays(32, 2048, copied=False)
    without = tiles.Kernel(F32, Functions(none, none))
    assert not without.takes_digits(512, 128)
    assert not without.pays(32, 2048, copied=False)
