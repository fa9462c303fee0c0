"""Ops taken apart that a CPU's own graphs do not have: a GPU's are checked by their formulas."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn import rand
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fxkfac
from fxkfac.errors import UnsupportedUse
from fxkfac.graph.decompositions import decompose
from fxkfac.graph.front_ends.recurrence import FUSED

aten = torch.ops.aten


@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_has_no_bias_to_leave_out(fused: bool) -> None:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    op = aten._fused_rms_norm.default if fused else aten.rms_norm.default
    y = graph.call_function(op, (x, [4], w, 1e-6))
    graph.output(graph.call_function(operator.getitem, (y, 0)) if fused else y)
    decompose(graph, [w], [x])
    assert aten.mul.Tensor in {node.target for node in graph.nodes}
    found = GraphModule(nn.Module(), graph)(rand(5, 4), rand(4, seed=1))
    expected = F.rms_norm(rand(5, 4), [4], rand(4, seed=1), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


CELLS: dict[str, tuple[Any, type[nn.RNNCellBase]]] = {
    "gru": (aten._thnn_fused_gru_cell.default, nn.GRUCell),
    "lstm": (aten._thnn_fused_lstm_cell.default, nn.LSTMCell),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells_that_a_gpu_runs_as_one_op(name: str, biased: bool) -> None:
    op, kind = CELLS[name]
    cell = kind(3, 4, bias=biased).double()  # type: ignore[call-arg]
    x, h, c = rand(5, 3), rand(5, 4, seed=1), rand(5, 4, seed=2)
    gates = F.linear(x, cell.weight_ih), F.linear(h, cell.weight_hh)
    biases = [cell.bias_ih, cell.bias_hh] if biased else []
    if name == "lstm":
        found, expected = FUSED[op](*gates, c, *biases)[:2], cell(x, (h, c))
    else:
        found, expected = FUSED[op](*gates, h, *biases)[:1], (cell(x, h),)
    torch.testing.assert_close(found, tuple(expected), rtol=0, atol=1e-14)


Z = rand(3, 4, seed=9)
# The model, and the shapes of the parameters that constants are joined with.
PARTS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "bias": (
        lambda p, x: F.linear(x, p["W"], torch.cat((p["q"], Z[0, :2], p["v"]))),
        {"q": (3,), "v": (1,)},
    ),
    "addmm": (
        lambda p, x: torch.addmm(
            torch.cat((Z[0, :2], p["q"])), x.flatten(1), p["W"].repeat(1, 3).T
        ),
        {"q": (4,)},
    ),
    "last axis": (lambda p, x: torch.cat((p["t"], Z[:3, :1]), -1) + x, {"t": (3, 3)}),
    "first axis": (lambda p, x: x + torch.cat([Z[:1], p["t"]]), {"t": (2, 4)}),
    "not added": (
        lambda p, x: torch.cat([p["t"].expand(len(x), 1, 4), x.new_ones(len(x), 2, 4)], 1) * x,
        {"t": (1, 1, 4)},
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_constants_that_are_joined_with_parameters(case: str) -> None:
    """Each entry meets one place of each datum, and its block is exact."""
    first, shapes = PARTS[case]

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(p, x).tanh().reshape(len(x), -1)

    x, y = rand(5, 3, 4), rand(5, 1)
    params = {name: rand(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    params["W"] = rand(6, 4, seed=7)
    y = y.expand(model(params, x).shape)
    program = fxkfac.trace(model, x, params)
    loss = nn.MSELoss()
    assert max(fxkfac.check(program, loss, (x, y)).values()) < 1e-14
    factors = fxkfac.kfac(program, loss, (x, y), sharing="reduce")
    for name in shapes:
        exact = fxkfac.exact.ggn(model, loss, (x, y), [name], params)
        torch.testing.assert_close(factors[name].dense(), exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("alpha", "beta"), [(0, 1), (2, 1), (1, 3)])
def test_what_is_added_with_a_factor_is_not_taken_apart(alpha: float, beta: float) -> None:
    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.addmm(torch.cat((p["q"], Z[0, :2])), x, p["W"].T, alpha=alpha, beta=beta)

    params = {"W": rand(6, 4), "q": rand(4)}
    with pytest.raises(UnsupportedUse, match="q enters"):
        fxkfac.trace(model, rand(5, 4), params)


def tokens(p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    h = x @ p["W"]
    h[mask] = p["t"]
    return h.tanh()


def places(p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    h = x @ p["W"]
    h[:, torch.tensor([True, False, True])] = p["t"]
    return h.tanh()


def behind_a_norm(p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    h = torch.nn.functional.rms_norm(x @ p["W"], (2,), p["s"])
    h[mask] = p["t"]
    return h.tanh()


def numbers(p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    h = p["t"].repeat(len(x), 3, 1)
    h[mask] = 0.5
    return (x @ p["W"] * h).tanh()


@pytest.mark.parametrize("model", [tokens, places, behind_a_norm, numbers])
def test_what_stands_where_a_mask_is_true_has_factors(model: Any) -> None:
    data = (rand(5, 3, 4), rand(5, 3, seed=1) > 0), rand(5, 3, 2, seed=2)
    params, loss = {"s": rand(2), "W": rand(4, 2, seed=3), "t": rand(2, seed=4)}, nn.MSELoss()
    program = fxkfac.trace(model, data[0], params)
    assert max(fxkfac.check(program, loss, data).values()) < 1e-14
    found = fxkfac.kfac(program, loss, data)["t"].dense()
    exact = fxkfac.exact.ggn(model, loss, data, ["t"], params)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-15)


def set_item(p: dict[str, Tensor], x: Tensor) -> Tensor:
    t = torch.empty(len(x), 4, 4, dtype=x.dtype)
    t[:, 0], t[:, 1:] = p["w"], x
    return t


def scattered(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return x.select_scatter(p["w"].expand(len(x), 4), 1, 0)


def scattered_to_places(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return x.slice_scatter(p["w"].expand(len(x), 2, 4), 1, 1, 3)


@pytest.mark.parametrize("write", [set_item, scattered, scattered_to_places])
def test_what_is_written_among_data_has_factors(write: Any) -> None:
    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        t: Tensor = write(p, x)
        return t.softmax(1).sum(1) * t.tanh().sum(1)

    params, data = {"w": rand(4)}, (rand(3, 3, 4, seed=1), rand(3, 4, seed=2))
    program = fxkfac.trace(model, data[0], params)
    assert max(fxkfac.check(program, nn.MSELoss(), data).values()) < 1e-12


def test_what_is_written_into_another_dtype_is_refused_by_name_and_line() -> None:
    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        t = torch.zeros(len(x), 4, 4, dtype=torch.float32)
        t[:, 0] = p["w"]
        return t.sum(1) + x.sum(1).to(torch.float32)

    with pytest.raises(
        UnsupportedUse, match=r"enters copy_ at .*test_decompositions.py.* copy_, or"
    ):
        fxkfac.trace(model, rand(3, 3, 4), {"w": rand(4)})


SPELLINGS: dict[str, tuple[Any, Tensor]] = {
    "lerp by a number": (lambda x, w: torch.lerp(x, w[0], 0.4), rand(5, 4)),
    "rsub": (lambda x, w: torch.rsub(x, w[0], alpha=2), rand(5, 4)),
    "last bag's end": (
        lambda x, w: F.embedding_bag(
            x.flatten(), w, torch.arange(0, 16, 3), mode="sum", include_last_offset=True
        ),
        torch.arange(15).view(5, 3) % 6,
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_other_spellings(case: str) -> None:
    spelt, x = SPELLINGS[case]
    params, data = {"w": rand(6, 4)}, (x, rand(5, 4, seed=2))
    program = fxkfac.trace(lambda p, x: spelt(x, p["w"]).tanh(), x, params)
    assert max(fxkfac.check(program, nn.MSELoss(), data).values()) < 1e-12


def test_rows_that_differ_where_a_mask_is_true_are_not_taken_apart() -> None:
    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = p["t"].repeat(len(x), 1)
        h[x[:, 0] > 0] = x[x[:, 0] > 0]
        return h * x

    with pytest.raises(UnsupportedUse, match=r"t enters aten\.index_put"):
        fxkfac.trace(model, rand(5, 4), {"t": rand(4, seed=1)})
