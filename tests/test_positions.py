"""Tables of positions that meet the data in attention, and what else transformers brought along.

Every table here is looked up without data, and added to scores or masked before. Its dense block
is made of every datum's own gradient: it is the GGN's only if no datum's part is lost or mixed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import MSE, rand

import fxkfac
from fxkfac import errors
from fxkfac.graph.digits import tolerance
from fxkfac.graph.front_ends.capture import FRONT_ENDS

T = 4  # positions
APART = torch.arange(T)[:, None] - torch.arange(T) + T - 1  # how far each is from each other
WAVES = rand(2, 2 * T - 1, seed=5)
PARAMS = {"table": rand(2 * T - 1, 2), "W": rand(4, 6, seed=1), "out": rand(6, 3, seed=2)}

Biased = Callable[[Tensor, Tensor], Tensor]


def attend(params: dict[str, Tensor], x: Tensor, biased: Biased) -> Tensor:
    """Attention of two heads whose mask is what `biased` makes of the biases."""
    heads = (x @ params["W"]).unflatten(-1, (2, 3)).transpose(1, 2)
    bias = params["table"][APART].permute(2, 0, 1)[None]  # (1, heads, T, T)
    found = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=biased(bias, x))
    return found.transpose(1, 2).flatten(2).mean(1) @ params["out"]


def kept(x: Tensor) -> Tensor:
    """Which positions a datum has; all have the first."""
    return torch.cat([torch.ones_like(x[:, :1, 0], dtype=torch.bool), x[:, 1:, 0] > 0], 1)[
        :, None, None
    ]


def windows(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Places numbered in one row, which a view takes apart."""
    scores = (x @ params["W"]) @ (x @ params["W"]).mT
    bias = params["table"][APART.flatten()].view(T, T, 2).sum(-1)
    return (torch.softmax(scores + bias, -1) @ x @ params["W"]).mean(1) @ params["out"]


def one_head(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """An axis of length one that the addition does not have."""
    scores = (x @ params["W"]) @ (x @ params["W"]).mT
    bias = params["table"][:, :1][APART].view(T, T)
    return (torch.softmax(scores + bias, -1) @ x @ params["W"]).mean(1) @ params["out"]


def split_windows(params: dict[str, Tensor], x: Tensor) -> Tensor:
    heads = (x @ params["W"]).unflatten(-1, (2, 3)).transpose(1, 2)
    bias = params["table"][APART.flatten()].view(T, T, -1).permute(2, 0, 1).contiguous()
    found = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias[None])
    return found.transpose(1, 2).flatten(2).mean(1) @ params["out"]


def in_windows(p: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """Positions within windows, of which each datum has two."""
    y = torch.tanh(x.view(-1, 2, 4)[..., :2] + positions) @ p["W"][:2]
    return y.view(len(x), -1, 6).mean(1) @ p["out"]


SPELLINGS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "the mask itself": lambda p, x: attend(p, x, lambda bias, x: bias),
    "where, a number last": lambda p, x: attend(
        p, x, lambda bias, x: torch.where(kept(x), bias, -1e9)
    ),
    "where, a number first": lambda p, x: attend(
        p, x, lambda bias, x: torch.where(~kept(x), -1e9, bias)
    ),
    "masked_fill": lambda p, x: attend(p, x, lambda bias, x: bias.masked_fill(~kept(x), -1e9)),
    "plus a mask of the data": lambda p, x: attend(p, x, lambda bias, x: bias - 9.0 * ~kept(x)),
    "plus a mask in the data's shape": lambda p, x: attend(
        p, x, lambda bias, x: bias + x.new_full((len(x), 1, 1, T), 0.5)
    ),
    "one head": one_head,
    "places in one row": split_windows,
    "looked up for each window": lambda p, x: in_windows(p, x, p["table"][torch.arange(2)]),
    "a product for each window": lambda p, x: in_windows(p, x, WAVES @ p["table"]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_table_of_positions(name):
    model, x, y = SPELLINGS[name], rand(5, T, 4, seed=3), rand(5, 3, seed=4)
    program = fxkfac.trace(model, x, PARAMS, structure={"table": "dense"})
    assert max(fxkfac.check(program, MSE, (x, y)).values()) < 1e-12
    expected = fxkfac.exact.ggn(model, MSE, (x, y), "table", PARAMS)
    found = fxkfac.kfac(program, MSE, (x, y)).dense("table")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not program.tapped.unsupported


@pytest.mark.parametrize(
    "name",
    [
        "where, a number last",
        "places in one row",
        "looked up for each window",
        "a product for each window",
    ],
)
def test_its_factors_add_up(name):
    x, y = rand(5, T, 4, seed=3), rand(5, 3, seed=4)
    program = fxkfac.trace(SPELLINGS[name], x, PARAMS)
    for sharing in ("expand", "reduce"):
        whole = fxkfac.kfac(program, MSE, (x, y), sharing=sharing)
        singles = [(x[k : k + 1], y[k : k + 1]) for k in range(5)]
        apart = fxkfac.kfac(program, MSE, singles, sharing=sharing)
        torch.testing.assert_close(apart.dense(), whole.dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["looked up for each window", "a product for each window"])
def test_eigenvalues_of_a_table_for_each_window(name):
    model, x, y = SPELLINGS[name], rand(5, T, 4, seed=3), rand(5, 3, seed=4)
    program = fxkfac.trace(model, x, PARAMS)
    block = fxkfac.ekfac(program, MSE, (x, y), fxkfac.kfac(program, MSE, (x, y)))["table"]
    expected = fxkfac.exact.ggn(model, MSE, (x, y), "table", PARAMS)
    torch.testing.assert_close(block.eigenvalues.sum(), expected.trace(), rtol=1e-10, atol=1e-12)


def test_a_table_that_is_summed_over_heads_is_refused():
    """A sum of its columns is no layout op; that is said, and no number is wrong."""
    with pytest.raises(errors.UnsupportedUse, match="table"):
        fxkfac.trace(windows, rand(5, T, 4), PARAMS)


def in_float32(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Normed and scaled in float32, whatever the parameters' dtype."""
    h = (x @ params["W"]).float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True)) * (1 + params["scale"].float())
    return h.double() @ params["out"]


def test_float32_inside_leaves_float32s_digits():
    params = {"W": rand(4, 6), "scale": rand(6, seed=1), "out": rand(6, 3, seed=2)}
    x, y = rand(50, 4, seed=3), rand(50, 3, seed=4)
    program = fxkfac.trace(in_float32, x, params)
    found = fxkfac.check(program, MSE, (x, y))
    assert max(found.values()) < 1e-5
    assert all(use.batch is not None for use in program.uses)
    assert not program.tapped.coupled
    lowest = program.tapped.captured.lowest
    assert lowest == torch.float32
    one = torch.ones((), dtype=torch.float64)
    assert tolerance(one, lowest) < 1e-3  # a per cent still shows


def test_under_autocast_scale_and_data_have_different_dtypes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.out(torch.tanh(self.inside(x)) * self.scale).float()

    x, y = rand(5, 4).float(), rand(5, 3).float()
    with torch.random.fork_rng():
        program = fxkfac.trace(Model(), x)
    assert max(fxkfac.check(program, MSE, (x, y)).values()) < 1e-2  # two digits of bfloat16


def compared(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Every datum with every other one."""
    h = torch.tanh(x @ params["W"]) * params["scale"]
    return h @ h.mT


def test_data_that_are_compared_are_coupled():
    params, x, y = {"W": rand(4, 3), "scale": rand(3, seed=1)}, rand(5, 4, seed=2), rand(5, 5)
    program = fxkfac.trace(compared, x, params)
    assert program.tapped.coupled
    assert program.tapped.prediction is None
    assert all(use.batch is not None for use in program.uses)
    assert max(fxkfac.check(program, MSE, (x, y)).values()) < 1e-12
    order = torch.tensor([3, 0, 4, 1, 2])
    found = fxkfac.kfac(program, MSE, (x[order], y[order][:, order]), fisher="empirical")
    expected = fxkfac.kfac(program, MSE, (x, y), fisher="empirical")
    torch.testing.assert_close(found.dense(), expected.dense())
    exact = fxkfac.trace(compared, x, params, structure={"scale": "dense"})
    with pytest.raises(errors.BatchAxisError):
        fxkfac.kfac(exact, MSE, (x, y), fisher="empirical")


def scaled(params: dict[str, Tensor], x: Tensor) -> Tensor:
    heads = (x @ params["W"])[:, None] * params["log_scale"].exp()
    return F.scaled_dot_product_attention(heads, heads, heads)[:, 0].mean(1)


SCALED = {"W": rand(4, 3), "log_scale": rand(3, seed=1)}


def test_where_no_front_end_can_help_only_one_is_tried(monkeypatch):
    tried = []
    for name, front_end in list(FRONT_ENDS.items()):

        def counted(*args, name=name, front_end=front_end):
            tried.append(name)
            return front_end(*args)

        monkeypatch.setitem(FRONT_ENDS, name, counted)
    with pytest.raises(errors.UnsupportedUse, match=r"log_scale enters aten\.exp"):
        fxkfac.trace(scaled, rand(5, T, 4), SCALED)
    assert tried == ["torch.export"]


def test_torch_says_nothing_of_its_own_doings(capfd):
    """Neither that vmap knows no fused attention, nor the graph of an export that failed."""
    x, y = rand(5, T, 4), rand(5, 3)
    program = fxkfac.trace(scaled, x, SCALED, structure={"log_scale": "diagonal"})
    fxkfac.kfac(program, MSE, (x, y), fisher="empirical")

    def looping(params, x):
        for k in range(int((x > 0).sum())):
            x = x + k
        return scaled(params, x)

    with pytest.raises(errors.CaptureError):
        fxkfac.trace(looping, x, SCALED)
    assert capfd.readouterr() == ("", "")


def test_what_the_user_prints_is_seen(capfd):
    def model(params, x):
        print("mine", file=sys.stderr)
        return x @ params["W"]

    fxkfac.trace(model, rand(5, 4), {"W": rand(4, 3)})
    assert set(capfd.readouterr().err.split()) == {"mine"}
