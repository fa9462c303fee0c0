"""On a GPU, where there is one: the numbers that the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from devices import (
    CAPABILITIES,
    assert_equal,
    digits_like,
    kfac,
    network,
    of_factors,
    on,
    on_the_cpu,
    traced,
)
from torch import nn
from zoo import CE, MSE, ZOO, Entry, rand

import fxkfac
from fxkfac import errors

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

PLAIN = {n: e for n, e in ZOO.items() if e.expected == "right" and not e.coupled and not e.random}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    found = CAPABILITIES[name](network().cuda(), on("cuda", digits_like()))
    assert_equal(found, on_the_cpu(name), "cuda")


def on_gpu(entry: Entry, n: int) -> tuple[Any, Any, Any]:
    """Model, parameters and data there; or skipped, if the model itself has tensors elsewhere."""
    model, params = entry.build()
    if isinstance(model, nn.Module):
        model = model.cuda()
    return model, on("cuda", params), on("cuda", entry.data(n))


@pytest.mark.parametrize("name", PLAIN)
def test_models_of_the_zoo_on_a_gpu(name: str) -> None:
    entry = ZOO[name]
    model, params, data = on_gpu(entry, 4)
    try:
        program = traced(entry, model, params, data)
    except errors.CaptureError as error:
        if "same device" in str(error):
            pytest.skip("its function has tensors on the CPU in it")
        raise
    tolerance = max(entry.tolerance, 1e-9)
    assert max(fxkfac.check(program, entry.loss, data).values()) < tolerance
    found = of_factors(fxkfac.kfac(program, entry.loss, data, fisher="empirical"))
    on_cpu = entry.trace(*entry.build(), 4)
    expected = fxkfac.kfac(on_cpu, entry.loss, entry.data(4), fisher="empirical")
    if entry.tolerance <= 1e-9:
        assert_equal(found, of_factors(expected), "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_labels_are_drawn_on_the_generators_device(device: str) -> None:
    model, data = network().cuda(), on("cuda", digits_like(600))
    program = fxkfac.trace(model, data[0])
    before = torch.cuda.get_rng_state()
    made = [
        fxkfac.kfac(program, CE, data, generator=torch.Generator(device).manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.cuda.get_rng_state())
    first, again, other = map(of_factors, made)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    exact = of_factors(fxkfac.kfac(program, CE, data, fisher="type-2"))
    assert all((first[k] - exact[k]).norm() < 0.2 * exact[k].norm() for k in exact)


def test_mean_squared_errors_draw_there_too() -> None:
    program = fxkfac.trace(nn.Linear(3, 2).double().cuda(), rand(500, 3).cuda())
    data = rand(500, 3).cuda(), rand(500, 2, seed=5).cuda()
    drawn = fxkfac.kfac(program, MSE, data, generator=torch.Generator().manual_seed(0))
    exact = fxkfac.kfac(program, MSE, data, fisher="type-2")
    for name, block in exact.items():
        assert (drawn[name].dense() - block.dense()).norm() < 0.3 * block.dense().norm()


def test_files_go_from_one_device_to_the_other(tmp_path: Path) -> None:
    data = digits_like()
    there = fxkfac.trace(network().cuda(), data[0].cuda())
    here = fxkfac.trace(network(), data[0])
    factors = fxkfac.kfac(there, CE, on("cuda", data), fisher="type-2")
    fxkfac.save(factors, tmp_path / "factors.safetensors")
    loaded = fxkfac.load(tmp_path / "factors.safetensors", here, CE)
    assert_equal(of_factors(loaded), {k: t.cpu() for k, t in of_factors(factors).items()}, "cpu")
    back = fxkfac.load(tmp_path / "factors.safetensors", there, CE)
    assert all(torch.equal(block.dense(), factors[k].dense()) for k, block in back.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_factors_in_float32(dtype: torch.dtype) -> None:
    model, (x, y) = network().float().cuda(), on("cuda", digits_like())
    x = x.float()
    program = fxkfac.trace(model, x)
    with torch.autocast("cuda", dtype):
        found = fxkfac.kfac(fxkfac.trace(model, x), CE, (x, y), fisher="type-2")
    expected = fxkfac.kfac(program, CE, (x, y), fisher="type-2")
    for name, block in expected.items():
        got = found[name].dense()
        assert got.dtype == torch.float32
        assert (got - block.dense()).norm() < 0.05 * block.dense().norm()


@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_inductor_on_a_gpu(fisher: str) -> None:
    found = kfac(network().cuda(), on("cuda", digits_like()), fisher=fisher, backend="inductor")
    assert_equal(found, on_the_cpu(fisher), "cuda")


def test_one_rank_with_nccl(tmp_path: Path) -> None:
    data = on("cuda", digits_like())
    program = fxkfac.trace(network().cuda(), data[0])
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    try:
        from fxkfac import distributed

        found = distributed.kfac(program, CE, data, fisher="type-2")
    finally:
        dist.destroy_process_group()
    assert_equal(of_factors(found), on_the_cpu("type-2"), "cuda")
