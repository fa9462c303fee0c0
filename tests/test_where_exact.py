"""Where KFAC must be exact: the factors against the dense GGN by plain autodiff."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference.case import CE, CE_SUM, MSE, MSE_SUM, N, assert_close, seeded, targets_for
from torch import Tensor, nn
from zoo import Made, rand

import fxkfac

SHARINGS = pytest.mark.parametrize("sharing", ["expand", "reduce"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


def dense_ggn(model: nn.Module, loss: nn.Module, x: Any, y: Tensor, names: list[str]) -> Tensor:
    """Jᵀ (∇²_f loss) J by plain autodiff, for whatever axis the data are on."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    chosen = [params[name] for name in names]

    def predict(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, {**params, **dict(zip(names, tensors, strict=True))}, (x,)
        )

    f = predict(*chosen).detach()
    H = torch.autograd.functional.hessian(lambda at: loss(at, y), f)
    jacobians = torch.autograd.functional.jacobian(predict, tuple(chosen))
    J = torch.cat([j.reshape(f.numel(), -1) for j in jacobians], 1)
    return J.T @ H.reshape(f.numel(), -1) @ J


def require_exact(
    model: nn.Module,
    loss: nn.Module,
    x: Any,
    blocks: Any = None,
    batch_axis: int = 0,
    **options: Any,
) -> None:
    """Every block (or the chosen ones) equals the dense GGN block."""
    y = targets_for(loss, model(x).detach())
    program = fxkfac.trace(model, x, batch_axis=batch_axis)
    factors = fxkfac.kfac(program, loss, (x, y), **options)
    chosen = [name for name in factors if blocks is None or blocks(factors[name])]
    assert chosen
    for name in chosen:
        names = list(factors[name].params)
        assert_close(factors.dense(*names), dense_ggn(model, loss, x, y, names))


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))


@REDUCTIONS
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
@pytest.mark.parametrize("apart", [False, True], ids=["joint", "apart"])
def test_deep_linear_net_with_independent_axes(reduction, shape, apart):
    """Ground truth 2, with any number of axes along which nothing is mixed."""
    require_exact(
        seeded(deep_linear), nn.MSELoss(reduction=reduction), rand(N, *shape),
        separate_weight_and_bias=apart,
    )  # fmt: skip


@REDUCTIONS
def test_deep_linear_net_by_hand_and_time_major(reduction):
    model = seeded(lambda: Made(lambda m, x: (x @ m.W + m.b) @ m.V.T, W=(4, 3), b=(3,), V=(2, 3)))
    loss = nn.MSELoss(reduction=reduction)
    require_exact(model, loss, rand(5, N, 4), batch_axis=1)
    require_exact(model, loss, rand(N, 5, 4))


@REDUCTIONS
def test_deep_linear_net_converges_by_sampling(reduction):
    """Ground truth 2: Monte Carlo comes near; the empirical factors do not."""
    model, x = seeded(deep_linear), rand(N, 5, 4)
    loss, y = nn.MSELoss(reduction=reduction), rand(N, 5, 2, seed=5)
    program, generator = fxkfac.trace(model, x), torch.Generator().manual_seed(0)
    expected = dense_ggn(model, loss, x, y, ["1.weight"])

    def error(fisher: str, samples: int) -> float:
        factors = fxkfac.kfac(
            program, loss, (x, y), fisher=fisher, mc_samples=samples, generator=generator
        )
        return float((factors.dense("1.weight") - expected).norm() / expected.norm())

    assert error("mc", 1000) < 0.1
    assert error("empirical", 1) > 0.3


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(1),
    "sum": lambda h: h.sum(1),
    "einsum": lambda h: torch.einsum("nto->no", h),
}


@REDUCTIONS
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("apart", [False, True], ids=["joint", "apart"])
def test_reduce_is_exact_under_pooling(reduction, pool, apart):
    """Ground truth 3; layers above the pooling are exact, too."""
    model = Made(
        lambda m, x: m.above(POOLS[pool](m.below(x))),
        below=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)),
        above=nn.Linear(3, 2),
    )
    require_exact(
        seeded(lambda: model), nn.MSELoss(reduction=reduction), rand(N, 5, 4),
        sharing="reduce", separate_weight_and_bias=apart,
    )  # fmt: skip


@REDUCTIONS
def test_reduce_is_exact_under_pooling_time_major(reduction):
    model = Made(lambda m, x: m.b(m.a(x).mean(0)), a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    loss = nn.MSELoss(reduction=reduction)
    require_exact(seeded(lambda: model), loss, rand(5, N, 4), batch_axis=1, sharing="reduce")


@REDUCTIONS
def test_reduce_is_exact_for_pooled_convolutions(reduction):
    """Every place has the same gradient: circular padding, or patches side by side."""
    for conv in (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 3, 2, stride=2),
        nn.Conv2d(2, 3, 2, dilation=2),
    ):
        model = seeded(
            lambda conv=conv: nn.Sequential(
                conv, nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        )
        require_exact(model, nn.MSELoss(reduction=reduction), rand(N, 2, 4, 4), sharing="reduce")


@REDUCTIONS
def test_grouped_reduce_is_block_diagonal_and_exact_in_the_blocks(reduction):
    model = seeded(lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.AdaptiveAvgPool1d(1)))
    loss, x = nn.MSELoss(reduction=reduction), rand(N, 4, 5)
    y = rand(N, 6, 1, seed=5)
    factors = fxkfac.kfac(fxkfac.trace(model, x), loss, (x, y), sharing="reduce")
    names = ["0.weight", "0.bias"]
    group = torch.cat([torch.arange(24) // 12, torch.arange(6) // 3])
    same = group[:, None] == group
    assert_close(factors.dense(*names), dense_ggn(model, loss, x, y, names) * same)


def is_bias(block: Any) -> bool:
    return all(term.plan.is_bias for term in block.terms)


def _biased() -> Iterator[tuple[str, Callable[[], nn.Module], Tensor, nn.Module, int]]:
    tanh = nn.Tanh
    yield "mlp", lambda: nn.Sequential(nn.Linear(4, 3), tanh(), nn.Linear(3, 3)), rand(N, 4), CE, 0
    yield (
        "sequence",
        lambda: Made(lambda m, x: m.b(m.a(x).tanh().mean(1)), a=nn.Linear(4, 3), b=nn.Linear(3, 2)),
        rand(N, 5, 4), MSE, 0,
    )  # fmt: skip
    yield (
        "sequence of classes",
        lambda: Made(
            lambda m, x: m.b(m.a(x).cumsum(1)).sin().mT, a=nn.Linear(4, 3), b=nn.Linear(3, 3)
        ),
        rand(N, 5, 4), CE_SUM, 0,
    )  # fmt: skip
    yield (
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, groups=2, padding="same"), tanh(), nn.Flatten(), nn.Linear(16, 3),
        ),
        rand(N, 2, 4, 4), CE, 0,
    )  # fmt: skip
    yield (
        "called twice",
        lambda: Made(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(4, 4)),
        rand(N, 4),
        MSE_SUM,
        0,
    )
    yield (
        "time major attention",
        lambda: Made(lambda m, x: m.a(x, x, x)[0].mean(0), a=nn.MultiheadAttention(4, 2)),
        rand(5, N, 4), MSE, 1,
    )  # fmt: skip
    yield (
        "places and parts",
        lambda: Made(
            lambda m, x: (x @ m.W[:, :3] - m.b[:3]).tanh().sum(1) + m.b[3:], W=(4, 4), b=(6,)
        ),
        rand(N, 5, 4), MSE, 0,
    )  # fmt: skip
    yield (
        "one bias for every place",
        lambda: Made(lambda m, x: (x @ m.W + m.b).tanh().mean(1), W=(4, 3), b=(5, 3)),
        rand(N, 5, 4), CE, 0,
    )  # fmt: skip
    yield (
        "experts",
        lambda: Made(
            lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.W).tanh().sum(0),
            W=(2, 4, 3), b=(2, 1, 3),
        ),
        rand(N, 2, 4), CE, 0,
    )  # fmt: skip


BIASED = {name: rest for name, *rest in _biased()}


@SHARINGS
@pytest.mark.parametrize("name", BIASED)
def test_bias_blocks_are_exact(name, sharing):
    """Ground truth 5: whatever the model and however the bias is shared."""
    build, x, loss, axis = BIASED[name]
    require_exact(
        seeded(build), loss, x, is_bias, axis, sharing=sharing, separate_weight_and_bias=True
    )
