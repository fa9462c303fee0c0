"""Kernels of our own: where there is one, and what they do for a sum."""

from __future__ import annotations

import threading
from math import inf, nan

import pytest
import torch
from drawn import rand
from kernel_rows import F32, F64, KERNEL, PLAIN, error
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxkfac.linalg import Gram, add_gram, places, products, tiles


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
                patch.setattr(tiles, "kernel_of", lambda dtype: None)
            add_gram(sums, x)
    for scale in (0.1, 1.0):
        found, expected = sums.matrix(scale), 5 * scale * x.double().mT @ x.double()
        assert error(found, expected) < (1e-6 if dtype == F32 else 1e-14)


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
    tiles.kernel_of(F64).add(total, x=x, columns=2, **PLAIN)
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


def test_memory_to_work_in_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_kept", threading.local())
    small = places.room(100, F64)
    assert small.nbytes == 800
    assert places.room(200, F32) is small
    larger = places.room(places.KEPT, torch.uint8)
    assert places.room(1, F64) is larger
    assert places.room(places.KEPT + 1, torch.uint8).nbytes == places.KEPT + 1
    assert places.room(1, F64) is larger
    elsewhere: list[Tensor] = []
    thread = threading.Thread(target=lambda: elsewhere.append(places.room(1, F64)))
    thread.start()
    thread.join()
    assert elsewhere[0] is not larger
