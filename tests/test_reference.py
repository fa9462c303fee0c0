"""The factors against their definition, written out by hand; and where KFAC must be exact.

A reference forward pass writes every layer in its canonical form, y[g, n, s, o] = Σ_i x[g, n, s, i]
W[g, i, o] + b[g, o], with the data on the second axis and everything shared on the third, whatever
the model under test does. From the x and y that it collects the factors follow as defined:

    expand:  A = R Σ_{n s} x̃ x̃ᵀ               B = 1/(N S) Σ_{n s} Σ_c g gᵀ
    reduce:  A = R Σ_n x̂ x̂ᵀ, x̂ = mean_s x̃     B = 1/N Σ_n Σ_c ĝ ĝᵀ, ĝ = Σ_s g

with one backward pass for every datum and every column c of the square root of its loss Hessian.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Made, ints, rand

import fxkfac

N = 3
SHARINGS = pytest.mark.parametrize("sharing", ["expand", "reduce"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)


@dataclass
class Tape:
    """What the layers of a reference forward pass saw, by the layer's name."""

    uses: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def layer(self, name: str, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """x (n, s, i) or (g, n, s, i), W (i, o) or (g, i, o), b (o) or (g, o)."""
        if x.ndim == 3:
            bias = None if b is None else b.unsqueeze(0)
            return self.layer(name, x.unsqueeze(0), W.unsqueeze(0), bias)[0]
        y = torch.einsum("gnsi,gio->gnso", x, W)
        if b is not None:
            y = y + b[:, None, None]
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)  # x̃ = (x 1)
        self.uses.setdefault(name, []).append((x.detach(), y))
        return y

    def factors(
        self, name: str, vectors: list[Tensor], f: Tensor, R: float, sharing: str
    ) -> tuple[Tensor, Tensor]:
        """A and B of one layer, with a group axis."""
        xs, ys = zip(*self.uses[name], strict=True)
        grads = [torch.autograd.grad(f, ys, v, retain_graph=True) for v in vectors]
        x = torch.cat(xs, 2)  # several uses are one more shared axis
        g = torch.stack([torch.cat(columns, 2) for columns in grads])
        if sharing == "reduce":
            x, g = x.mean(2, keepdim=True), g.sum(3, keepdim=True)
        A = R * torch.einsum("gnsi,gnsj->gij", x, x)
        B = torch.einsum("cgnso,cgnsp->gop", g, g) / (x.shape[1] * x.shape[2])
        return A, B


def loss_factor(loss: nn.Module, f: Tensor) -> float:
    """R of the definition."""
    if isinstance(loss, nn.MSELoss):
        return 2.0 if loss.reduction == "sum" else 2.0 / f.numel()
    positions = f.numel() // f.shape[1]
    return 1.0 if loss.reduction == "sum" else 1.0 / positions


def columns(loss: nn.Module, f: Tensor) -> list[Tensor]:
    """For every datum and every column of its S: the column in the shape of f (n, classes, ..)."""
    found = []
    for n, *place in itertools.product(*map(range, f.shape)):
        column = torch.zeros_like(f)
        if isinstance(loss, nn.MSELoss):
            column[(n, *place)] = 1.0  # S = I
        else:
            c, site = place[0], tuple(place[1:])
            σ = f.detach()[(n, slice(None), *site)].softmax(0)
            S = σ.sqrt().diag() - torch.outer(σ, σ.sqrt())  # S = diag √σ − σ √σᵀ
            column[(n, slice(None), *site)] = S[:, c]
        found.append(column)
    return found


Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, and the same model by hand.

    Attributes:
        build: () -> the module under test.
        inputs: Its inputs for N data.
        forward: (parameters, inputs, tape) -> the prediction, the data first.
        loss: The loss.
        layers: For each layer on the tape, the name of its block and its place in `block.terms`.
        batch_axis: Batch axis of the module's inputs.
        prediction_axis: Batch axis of the module's prediction.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    forward: Callable[[Params, Any, Tape], Tensor]
    loss: nn.Module
    layers: Mapping[str, tuple[str, int]]
    batch_axis: int = 0
    prediction_axis: int = 0


CASES: dict[str, Case] = {}


def case(build: Callable[[], nn.Module], inputs: Any, layers: Any, loss: Any, **more: Any) -> Any:
    """Register a forward pass by hand as the reference of the module that `build` makes."""
    named = {k: (v, 0) if isinstance(v, str) else v for k, v in layers.items()}

    def register(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES[forward.__name__] = Case(build, inputs, forward, loss, named, **more)
        return forward

    return register


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    model = build().double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(0.5 * rand(*p.shape, seed=k + 20))
    return model


def conv_patches(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int = 1
) -> Tensor:
    """x (n, c, *space) -> (g, n, places, c/g · kernel), by going over places and offsets.

    padding: (before, after) for each axis.
    """
    x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    kernel = weight.shape[2:]
    places = [
        range(0, size - d * (k - 1), s)
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    rows = []
    for corner in itertools.product(*places):
        seen = [
            x[(slice(None), slice(None), *(a + o * d for a, o, d in zip(corner, at, dilation)))]  # noqa: B905
            for at in itertools.product(*map(range, kernel))
        ]
        rows.append(torch.stack(seen, -1))  # (n, c, kernel)
    return torch.stack(rows, 1).unflatten(2, (groups, -1)).flatten(3).permute(2, 0, 1, 3)


def conv_weight(W: Tensor, groups: int = 1) -> Tensor:
    """(out, c/g, *kernel) -> (g, c/g · kernel, out/g)."""
    return W.unflatten(0, (groups, -1)).flatten(2).mT


def image(y: Tensor, *places: int) -> Tensor:
    """(g, n, places, o) -> (n, g · o, *places)."""
    return y.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, places)


MSE, MSE_SUM = nn.MSELoss(), nn.MSELoss(reduction="sum")
CE, CE_SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


@case(
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    lambda: rand(N, 4),
    {"a": "0.weight", "b": "2.weight"},
    CE,
)
def mlp(p, x, tape):
    h = tape.layer("a", x[:, None], p["0.weight"].T, p["0.bias"]).tanh()
    return tape.layer("b", h, p["2.weight"].T, p["2.bias"])[:, 0]


@case(
    lambda: Made(
        lambda m, x: torch.einsum("od,nd->no", m.V, (x @ m.W + m.b).tanh()),
        W=(4, 5), b=(5,), V=(3, 5),
    ),
    lambda: rand(N, 4),
    {"a": "W", "b": "V"},
    MSE,
)  # fmt: skip
def unfused(p, x, tape):
    h = tape.layer("a", x[:, None], p["W"], p["b"]).tanh()
    return tape.layer("b", h, p["V"].T)[:, 0]


@case(
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(27, 3),
    ),
    lambda: rand(N, 2, 6, 4),
    {"conv": "0.weight", "head": "3.weight"},
    CE,
)  # fmt: skip
def conv_stride_padding(p, x, tape):
    rows = conv_patches(x, p["0.weight"], (2, 1), ((1, 1), (0, 0)), (1, 1))
    y = tape.layer("conv", rows, conv_weight(p["0.weight"]), p["0.bias"][None])
    h = image(y, 3, 3).relu().flatten(1)
    return tape.layer("head", h[:, None], p["3.weight"].T, p["3.bias"])[:, 0]


@case(
    lambda: nn.Sequential(
        nn.Conv2d(4, 6, (2, 3), dilation=(2, 1), groups=2, padding="same"), nn.Tanh(),
        nn.Conv2d(6, 6, 2, groups=6, bias=False),
    ),
    lambda: rand(N, 4, 3, 4),
    {"a": "0.weight", "b": "2.weight"},
    MSE_SUM,
)  # fmt: skip
def conv_groups_dilation(p, x, tape):
    rows = conv_patches(x, p["0.weight"], (1, 1), ((1, 1), (1, 1)), (2, 1), groups=2)
    y = tape.layer("a", rows, conv_weight(p["0.weight"], 2), p["0.bias"].view(2, 3))
    h = image(y, 3, 4).tanh()
    rows = conv_patches(h, p["2.weight"], (1, 1), ((0, 0), (0, 0)), (1, 1), groups=6)
    return image(tape.layer("b", rows, conv_weight(p["2.weight"], 6)), 2, 3)


@case(
    lambda: nn.Sequential(nn.Conv1d(2, 3, 4, padding="same", dilation=1), nn.Sigmoid()),
    lambda: rand(N, 2, 6),
    {"conv": "0.weight"},
    MSE,
)
def conv_same_even(p, x, tape):
    rows = conv_patches(x, p["0.weight"], (1,), ((1, 2),), (1,))
    y = tape.layer("conv", rows, conv_weight(p["0.weight"]), p["0.bias"][None])
    return image(y, 6).sigmoid()


@case(
    lambda: nn.Sequential(
        nn.Conv3d(1, 2, 2, stride=(1, 2, 1), dilation=(1, 1, 2)), nn.Tanh(), nn.Flatten(2)
    ),
    lambda: rand(N, 1, 3, 4, 3),
    {"conv": "0.weight"},
    CE,
)
def conv_3d(p, x, tape):
    rows = conv_patches(x, p["0.weight"], (1, 2, 1), ((0, 0),) * 3, (1, 1, 2))
    y = tape.layer("conv", rows, conv_weight(p["0.weight"]), p["0.bias"][None])
    return image(y, 2, 2, 1).tanh().flatten(2)


@case(
    lambda: Made(
        lambda m, x: m.a(x.reshape(-1, 4)).tanh().view(-1, 5, 3).transpose(1, 2), a=nn.Linear(4, 3)
    ),
    lambda: rand(N, 5, 4),
    {"a": "a.weight"},
    CE_SUM,
)
def flattened_rows(p, x, tape):
    return tape.layer("a", x, p["a.weight"].T, p["a.bias"]).tanh().mT


@case(
    lambda: Made(lambda m, x: m.b(m.a(x).tanh().mean(0)), a=nn.Linear(4, 3), b=nn.Linear(3, 2)),
    lambda: rand(5, N, 4),
    {"a": "a.weight", "b": "b.weight"},
    MSE,
    batch_axis=1,
)
def time_major(p, x, tape):
    h = tape.layer("a", x.transpose(0, 1), p["a.weight"].T, p["a.bias"]).tanh()
    return tape.layer("b", h.mean(1, keepdim=True), p["b.weight"].T, p["b.bias"])[:, 0]


def _attend(p, x, tape):
    qkv = tape.layer("in", x, p["attend.in_proj_weight"].T, p["attend.in_proj_bias"])
    q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in qkv.split(4, 2))
    h = (q @ k.mT / 2**0.5).softmax(-1) @ v
    W, b = p["attend.out_proj.weight"], p["attend.out_proj.bias"]
    return tape.layer("out", h.transpose(1, 2).flatten(2), W.T, b)


ATTENTION = {"in": "attend.in_proj_weight", "out": "attend.out_proj.weight"}


@case(
    lambda: Made(lambda m, x: m.attend(x, x, x)[0].mean(0), attend=nn.MultiheadAttention(4, 2)),
    lambda: rand(5, N, 4),
    ATTENTION,
    CE,
    batch_axis=1,
)
def attention_time_first(p, x, tape):
    return _attend(p, x.transpose(0, 1), tape).mean(1)


@case(
    lambda: Made(
        lambda m, x: m.attend(x, x, x, need_weights=False)[0],
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    lambda: rand(N, 3, 4),
    ATTENTION,
    MSE_SUM,
)
def attention_batch_first(p, x, tape):
    return _attend(p, x, tape)


@case(
    lambda: Made(lambda m, x: m.b(m.a(m.a(x).tanh()).sin()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
    lambda: rand(N, 4),
    {"a": "a.weight", "b": "b.weight"},
    CE,
)
def called_twice(p, x, tape):
    h = tape.layer("a", x[:, None], p["a.weight"].T, p["a.bias"]).tanh()
    h = tape.layer("a", h, p["a.weight"].T, p["a.bias"]).sin()
    return tape.layer("b", h, p["b.weight"].T, p["b.bias"])[:, 0]


@case(
    lambda: Made(lambda m, x: m.a(x).tanh().mean(1) + m.a(x[:, 0]).sin(), a=nn.Linear(4, 3)),
    lambda: rand(N, 5, 4),
    {"a": "a.weight"},
    MSE,
)
def different_ranks(p, x, tape):
    y = tape.layer("a", x, p["a.weight"].T, p["a.bias"]).tanh().mean(1)
    return y + tape.layer("a", x[:, :1], p["a.weight"].T, p["a.bias"]).sin()[:, 0]


@case(
    lambda: Made(lambda m, i: m.b(m.a(i).tanh().mean(1)), a=nn.Embedding(6, 4), b=nn.Linear(4, 3)),
    lambda: ints(N, 5, high=6),
    {"a": "a.weight", "b": "b.weight"},
    CE,
)
def embedding(p, i, tape):
    h = tape.layer("a", F.one_hot(i, 6).double(), p["a.weight"]).tanh()
    return tape.layer("b", h.mean(1, keepdim=True), p["b.weight"].T, p["b.bias"])[:, 0]


@case(
    lambda: Made(
        lambda m, i: (m.embed(i).cumsum(1).tanh() @ m.embed.weight.T).mT, embed=nn.Embedding(5, 3)
    ),
    lambda: ints(N, 4, high=5),
    {"embed": ("embed.weight", 0), "head": ("embed.weight", 1)},
    CE,
)
def tied_embedding(p, i, tape):
    h = tape.layer("embed", F.one_hot(i, 5).double(), p["embed.weight"]).cumsum(1).tanh()
    return tape.layer("head", h, p["embed.weight"].T).mT


def _recurrent(m, x):
    h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(m.a(step) + m.b(h))
    return h


@case(
    lambda: Made(_recurrent, a=nn.Linear(3, 4), b=nn.Linear(4, 4, bias=False)),
    lambda: rand(N, 5, 3),
    {"a": "a.weight", "b": "b.weight"},
    MSE,
)
def recurrent(p, x, tape):
    h = torch.zeros(N, 1, 4).double()
    for t in range(5):
        y = tape.layer("a", x[:, t : t + 1], p["a.weight"].T, p["a.bias"])
        h = torch.tanh(y + tape.layer("b", h, p["b.weight"].T))
    return h[:, 0]


@case(
    lambda: Made(
        lambda m, x: torch.einsum("bsi,hid->bhsd", x, m.W).sin().sum(2).flatten(1), W=(2, 4, 3)
    ),
    lambda: rand(N, 5, 4),
    {"W": "W"},
    CE,
)
def einsum_heads(p, x, tape):
    y = tape.layer("W", x, p["W"].permute(1, 0, 2).flatten(1))
    return y.sin().sum(1)


@case(
    lambda: Made(
        lambda m, x: torch.baddbmm(m.b[:, None], x.permute(2, 0, 1, 3).flatten(1, 2), m.W)
        .tanh()
        .view(2, -1, 5, 3)
        .mean((0, 2)),
        W=(2, 4, 3), b=(2, 3),
    ),
    lambda: rand(N, 5, 2, 4),
    {"W": "W"},
    MSE,
)  # fmt: skip
def experts(p, x, tape):
    return tape.layer("W", x.permute(2, 0, 1, 3), p["W"], p["b"]).tanh().mean((0, 2))


@case(
    lambda: Made(lambda m, x: m.V @ torch.tanh(m.W @ x + m.b[:, None]), W=(5, 4), b=(5,), V=(3, 5)),
    lambda: rand(4, N),
    {"a": "W", "b": "V"},
    MSE_SUM,
    batch_axis=1,
    prediction_axis=1,
)
def data_in_columns(p, x, tape):
    h = tape.layer("a", x.T[:, None], p["W"].T, p["b"]).tanh()
    return tape.layer("b", h, p["V"].T)[:, 0]


def targets_for(loss: nn.Module, f: Tensor) -> Tensor:
    if isinstance(loss, nn.MSELoss):
        return rand(*f.shape, seed=5)
    return ints(f.shape[0], *f.shape[2:], high=f.shape[1], seed=5)


@SHARINGS
@pytest.mark.parametrize("name", CASES)
def test_factors_are_as_defined(name, sharing):
    c = CASES[name]
    model, x = seeded(c.build), c.inputs()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    tape = Tape()
    f = c.forward(params, x, tape)
    prediction = model(x).detach()
    assert_close(
        prediction.transpose(0, c.prediction_axis), f.detach()
    )  # the reference is the model
    program = fxkfac.trace(model, x, batch_axis=c.batch_axis)
    data = (x, targets_for(c.loss, prediction))
    factors = fxkfac.kfac(program, c.loss, data, sharing=sharing)
    vectors, R = columns(c.loss, f), loss_factor(c.loss, f)
    for layer, (block, term) in c.layers.items():
        A, B = tape.factors(layer, vectors, f, R, sharing)
        found = factors[block].terms[term].grouped()
        assert_close(found[0], A)
        assert_close(found[1], B)


# --- where KFAC must be exact ---


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
