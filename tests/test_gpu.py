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

# Module.cuda gives each parameter a storage of its own.
APART = {"shared_storage"}
PLAIN = {n: e for n, e in ZOO.items() if e.expected == "right" and not e.coupled and not e.random}
PLAIN = {n: e for n, e in PLAIN.items() if n not in APART}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    found = CAPABILITIES[name](network().cuda(), on("cuda", digits_like()))
    assert_equal(found, on_the_cpu(name), "cuda")


def on_gpu(entry: Entry, n: int) -> tuple[Any, Any, Any]:
    """Model, parameters and data there; or skipped, if the model itself has tensors elsewhere."""
    model, params = entry.build()
    if isinstance(model, nn.Module):
        model = model.cuda()
    data = entry.data(n)
    there = on("cuda", data)
    if "pack" in entry.name:  # whose lengths PyTorch wants on the CPU
        pairs = zip(data[0], there[0], strict=True)
        there = tuple(here if here.dtype == torch.int64 else t for here, t in pairs), there[1]
    return model, on("cuda", params), there


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
    # PyTorch's own weight norm of float64 is 2e-8 off on a GPU.
    tolerance = 1e-7 if name == "weight_norm" else max(entry.tolerance, 1e-9)
    assert max(fxkfac.check(program, entry.loss, data).values()) < tolerance
    found = of_factors(fxkfac.kfac(program, entry.loss, data, fisher="empirical"))
    on_cpu = entry.trace(*entry.build(), 4)
    expected = fxkfac.kfac(on_cpu, entry.loss, entry.data(4), fisher="empirical")
    assert_equal(found, of_factors(expected), "cuda", tolerance)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_labels_are_drawn_on_the_generators_device(device: str) -> None:
    model, data = network().cuda(), on("cuda", digits_like(600))
    program = fxkfac.trace(model, data[0])
    before = torch.cuda.get_rng_state()
    made = [
        fxkfac.kfac(
            program, CE, data, fisher="mc", generator=torch.Generator(device).manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.cuda.get_rng_state())
    first, again, other = map(of_factors, made)
    # Not bit for bit: a convolution may add up in any order there.
    assert all((first[k] - again[k]).norm() < 1e-12 * first[k].norm() for k in first)
    assert any((first[k] - other[k]).norm() > 1e-3 * first[k].norm() for k in first)
    exact = of_factors(fxkfac.kfac(program, CE, data, fisher="type-2"))
    assert all((first[k] - exact[k]).norm() < 0.2 * exact[k].norm() for k in exact)


def test_mean_squared_errors_draw_there_too() -> None:
    program = fxkfac.trace(nn.Linear(3, 2).double().cuda(), rand(500, 3).cuda())
    data = rand(500, 3).cuda(), rand(500, 2, seed=5).cuda()
    generator = torch.Generator().manual_seed(0)
    drawn = fxkfac.kfac(program, MSE, data, fisher="mc", generator=generator)
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
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_inductor_on_a_gpu(fisher: str, sharing: str) -> None:
    options = {"fisher": fisher, "sharing": sharing}
    found = kfac(network().cuda(), on("cuda", digits_like()), backend="inductor", **options)
    assert_equal(found, kfac(network(), digits_like(), **options), "cuda")


def assert_same_step(found: fxkfac.Step, expected: fxkfac.Step) -> None:
    for name, block in expected.factors.items():
        torch.testing.assert_close(found.factors[name].dense(), block.dense())
    for name, g in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], g)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_batch_that_is_replayed(fisher: str) -> None:
    """Other parameters, data and draws each time; and what was returned stays as it was."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    model = model.double().cuda().train()
    program = fxkfac.trace(model, rand(8, 6).cuda())
    made = []
    for k in range(5):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        data = rand(8, 6, seed=k).cuda(), torch.arange(8, device="cuda") % 3
        for backend in ("inductor", "eager"):
            generator = torch.Generator().manual_seed(k)
            made.append(
                fxkfac.step(program, CE, data, fisher=fisher, generator=generator, backend=backend)
            )
    for found, expected in zip(made[::2], made[1::2], strict=True):
        assert_same_step(found, expected)


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


SHAPES = {  # channels, size, groups, and the convolution's own
    "stride one": ((3, 64, 12), {"kernel_size": 3, "padding": 1}),
    "even kernel": ((2, 5, 9), {"kernel_size": 4, "padding": 2}),
    "stride, dilation": ((2, 6, 17), {"kernel_size": 3, "stride": 2, "dilation": 2}),
    "groups": ((2, 8, 11), {"kernel_size": 3, "groups": 4, "padding": 1}),
    "larger than the image": ((1, 3, 2), {"kernel_size": 5, "padding": 2}),
    "one channel": ((40, 1, 28), {"kernel_size": 5}),
    "wide": ((4, 256, 6), {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions_of_awkward_shapes(name: str, dtype: torch.dtype) -> None:
    (n, channels, size), options = SHAPES[name]
    torch.manual_seed(0)
    net = nn.Conv2d(channels, 4, bias=False, **options).double()  # type: ignore[arg-type]
    x = rand(n, channels, size, size)
    data = x, rand(*net(x).shape, seed=2)
    expected = fxkfac.kfac(fxkfac.trace(net, x), MSE, data, fisher="empirical")["weight"]
    net, data = net.to("cuda", dtype), (data[0].to("cuda", dtype), data[1].to("cuda", dtype))
    found = fxkfac.kfac(fxkfac.trace(net, data[0]), MSE, data, fisher="empirical")["weight"]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, other in ((found.A, expected.A), (found.B, expected.B)):
        error = (mine.cpu().double() - other).norm() / other.norm()
        if dtype == torch.float64 or mine is found.A:  # TF32 has made the prediction, and so B
            assert error < tolerance


def test_a_large_sum_is_taken_in_strips() -> None:
    """More rows than one product is given, and further ones that come as a whole square."""
    from fxkfac.linalg import Gram, add_gram
    from fxkfac.linalg.products import LARGE

    d = 1100
    rows = rand(1, LARGE // d**2 + 1, d).cuda()
    gram = Gram(torch.full((1, d, d), torch.nan, dtype=torch.float64, device="cuda"))
    add_gram(gram, rows)
    assert gram.whole < d
    add_gram(gram, rows[:, :100])
    expected = rows.mT @ rows + rows[:, :100].mT @ rows[:, :100]
    assert (gram.matrix() - expected).norm() < 1e-12 * expected.norm()
