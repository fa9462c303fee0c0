"""Experts that rows choose: one group for each, however the choice is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxkfac

EXPERTS, D_IN, D_OUT, N, T = 4, 3, 2, 6, 5
Model = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]


def by_einsum(p, x, chosen):
    return torch.einsum("nti,ntio->nto", x, p["W"][chosen])


def by_matmul(p, x, chosen):
    return (x.unsqueeze(-2) @ p["W"][chosen]).squeeze(-2)


def by_bmm(p, x, chosen):
    own = p["W"].index_select(0, chosen.flatten())
    y = torch.bmm(own.transpose(1, 2), x.flatten(0, 1).unsqueeze(-1))
    return y.squeeze(-1).unflatten(0, chosen.shape)


def stored_the_other_way(p, x, chosen):
    return torch.einsum("nti,ntoi->nto", x, p["W"].mT[chosen])


SPELLINGS = [by_einsum, by_matmul, by_bmm, stored_the_other_way]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, T, D_IN, generator=generator, dtype=torch.float64)
    chosen = torch.randint(0, EXPERTS - 1, (N, T), generator=generator)  # nobody takes the last
    return x, chosen


@pytest.fixture
def params() -> dict[str, Tensor]:
    return {"W": torch.randn(EXPERTS, D_IN, D_OUT, dtype=torch.float64)}


@pytest.mark.parametrize("model", SPELLINGS)
def test_each_expert_has_the_factors_of_its_rows(model, params, data):
    x, chosen = data
    program = fxkfac.trace(model, data, params)
    (use,) = program.uses
    assert use.form.routes is not None
    y = torch.zeros(N, T, D_OUT, dtype=torch.float64)
    block = fxkfac.kfac(program, nn.MSELoss(reduction="sum"), (data, y))["W"]
    assert block.A.shape == (EXPERTS, D_IN, D_IN)
    assert block.B.shape == (EXPERTS, D_OUT, D_OUT)
    for e in range(EXPERTS):
        rows = x[chosen == e]
        torch.testing.assert_close(block.A[e], 2 * rows.mT @ rows)
        own = torch.eye(D_OUT, dtype=torch.float64) if len(rows) else torch.zeros(D_OUT, D_OUT)
        torch.testing.assert_close(block.B[e], own.double())  # one column for each output


@pytest.mark.parametrize("model", SPELLINGS)
def test_reduce_averages_the_rows_of_each_expert(model, params, data):
    x, chosen = data
    program = fxkfac.trace(model, data, params)
    y = torch.zeros(N, T, D_OUT, dtype=torch.float64)
    loss = nn.MSELoss(reduction="sum")
    block = fxkfac.kfac(program, loss, (data, y), sharing="reduce")["W"]
    for e in range(EXPERTS - 1):
        own = (chosen == e).to(x.dtype).unsqueeze(-1)
        seen = own.sum(1).squeeze(-1) > 0
        mean = (x * own).sum(1) / own.sum(1).clamp_min(1)
        torch.testing.assert_close(block.A[e], 2 * mean.mT @ mean)
        total = own.sum() / seen.sum()  # ĝ of a column is one for each row of the datum's
        torch.testing.assert_close(block.B[e], total * torch.eye(D_OUT).double())


@pytest.mark.parametrize("model", SPELLINGS)
def test_experts_have_the_same_factors_where_their_rows_are_sorted(model, params, data):
    """There no axis holds the data, though rows may have two."""

    def by_expert(p, x, chosen):
        order = chosen.flatten().argsort(stable=True)
        rows = model(p, x.flatten(0, 1)[order, None], chosen.flatten()[order, None]).squeeze(1)
        return torch.zeros_like(rows).index_copy(0, order, rows).unflatten(0, chosen.shape)

    y = torch.zeros(N, T, D_OUT, dtype=torch.float64)
    found, expected = (
        fxkfac.kfac(fxkfac.trace(f, data, params), nn.MSELoss(), (data, y))["W"]
        for f in (by_expert, model)
    )
    torch.testing.assert_close(found.A, expected.A)
    torch.testing.assert_close(found.B, expected.B)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_all_rows_of_a_sequence_choose_together(params, data, sharing):
    def model(p, x, chosen):
        return torch.einsum("nti,nio->nto", x, p["W"][chosen])

    x, chosen = data[0], data[1][:, 0]
    program = fxkfac.trace(model, (x, chosen), params)
    y = torch.zeros(N, T, D_OUT, dtype=torch.float64)
    loss = nn.MSELoss(reduction="sum")
    block = fxkfac.kfac(program, loss, ((x, chosen), y), sharing=sharing)["W"]
    for e in chosen.unique():
        own = x[chosen == e] if sharing == "expand" else x[chosen == e].mean(1, keepdim=True)
        rows = own.flatten(0, 1)
        torch.testing.assert_close(block.A[e], 2 * rows.mT @ rows)
        each = 1 if sharing == "expand" else T  # ĝ of a column is one for each row of the datum's
        torch.testing.assert_close(block.B[e], each * torch.eye(D_OUT).double())


@pytest.mark.parametrize("model", SPELLINGS)
def test_gradients_parts_and_dense(model, params, data):
    program = fxkfac.trace(model, data, params)
    y = torch.randn(N, T, D_OUT, dtype=torch.float64)
    loss = nn.MSELoss()
    assert max(fxkfac.check(program, loss, (data, y)).values()) < 1e-12
    whole = fxkfac.kfac(program, loss, (data, y))
    halves = [((data[0][k], data[1][k]), y[k]) for k in (slice(0, 2), slice(2, None))]
    parts = fxkfac.kfac(program, loss, halves)
    torch.testing.assert_close(parts.dense("W"), whole.dense("W"))
    exact = fxkfac.exact.ggn(model, loss, (data, y), ["W"], params)
    # The map is linear and the loss quadratic: KFAC is the GGN.
    torch.testing.assert_close(whole.dense("W"), exact)


def test_exact_blocks_of_experts(params, data):
    program = fxkfac.trace(by_einsum, data, params, structure={"W": "dense"})
    y = torch.randn(N, T, D_OUT, dtype=torch.float64)
    found = fxkfac.kfac(program, nn.MSELoss(), (data, y), fisher="empirical").dense("W")
    expected = fxkfac.exact.empirical_fisher(by_einsum, nn.MSELoss(), (data, y), ["W"], params)
    torch.testing.assert_close(found, expected)


def test_looked_up_vectors_stay_look_ups(data):
    def model(p, x, chosen):
        return (x * p["v"][chosen]).sum(-1, keepdim=True) + p["b"][chosen].unsqueeze(-1)

    params = {"v": torch.randn(EXPERTS, D_IN).double(), "b": torch.randn(EXPERTS).double()}
    program = fxkfac.trace(model, data, params)
    assert all(use.form.routes is None for use in program.uses)
    target = torch.zeros(N, T, 1, dtype=torch.float64)
    assert max(fxkfac.check(program, nn.MSELoss(), (data, target)).values()) < 1e-12


def test_a_matrix_that_is_read_elsewhere_stays_a_look_up(params, data):
    def model(p, x, chosen):
        own = p["W"][chosen]
        return torch.einsum("nti,ntio->nto", x, own) + own.sum(-2)

    program = fxkfac.trace(model, data, params)
    assert {use.op for use in program.uses} == {"aten.index.Tensor"}


def grouped(p, x, scores):
    """Tokens sorted by their expert, one grouped product, and back."""
    chosen = scores.flatten(0, 1).argmax(-1)
    order = chosen.argsort()
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
    sorted_rows = torch._grouped_mm(x.flatten(0, 1)[order], p["W"], offs=ends)
    y = torch.zeros_like(sorted_rows).index_copy(0, order, sorted_rows)
    return y.unflatten(0, scores.shape[:2])


def test_grouped_products(data):
    x, chosen = data
    scores = nn.functional.one_hot(chosen, EXPERTS).float()
    W = torch.randn(EXPERTS, 8, 4)
    x = torch.randn(N, T, 8)
    program = fxkfac.trace(grouped, (x, scores), {"W": W})
    (use,) = program.uses
    assert use.op == "aten._grouped_mm"
    y = torch.zeros(N, T, 4)
    block = fxkfac.kfac(program, nn.MSELoss(reduction="sum"), ((x, scores), y))["W"]
    for e in range(EXPERTS):
        rows = x[chosen == e]
        torch.testing.assert_close(block.A[e], 2 * rows.mT @ rows)
        torch.testing.assert_close(block.B[e], torch.eye(4) if len(rows) else torch.zeros(4, 4))


def test_experts_that_choose_among_all_data():
    """Every expert takes the tokens that it likes best, of whatever datum: no order of data."""

    def model(p, x):
        flat = x.flatten(0, 1)
        scores = (flat @ p["gate"]).softmax(-1)
        weights, chosen = scores.mT.topk(4, dim=1)  # (expert, capacity)
        own = torch.bmm(flat[chosen], p["W"]) * weights.unsqueeze(-1)
        out = torch.zeros_like(flat[:, :2]).index_add(0, chosen.flatten(), own.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    params = {"W": torch.randn(2, 3, 2).double(), "gate": torch.randn(3, 2).double()}
    x, y = torch.randn(N, T, 3).double(), torch.randn(N, T, 2).double()
    program = fxkfac.trace(model, x, params)
    assert max(fxkfac.check(program, nn.MSELoss(), (x, y)).values()) < 1e-12
    assert fxkfac.kfac(program, nn.MSELoss(), (x, y))["W"].A.shape == (2, 3, 3)
    with pytest.raises(fxkfac.errors.BatchAxisError):
        fxkfac.kfac(program, nn.MSELoss(), (x, y), sharing="reduce")


def test_several_indices_may_count_from_the_end():
    """Traced without negative indices, and given some afterwards."""

    def model(params, rows, columns):
        return torch.tanh(params["table"][rows, columns])

    params = {"table": torch.randn(4, 3, 2, dtype=torch.float64)}
    rows, columns = torch.tensor([[0, 1], [3, 2], [1, 1]]), torch.tensor([[0, 2], [1, 1], [2, 0]])
    program = fxkfac.trace(model, (rows, columns), params)
    y = torch.zeros(3, 2, 2, dtype=torch.float64)
    found = fxkfac.kfac(program, nn.MSELoss(), ((rows - 4, columns - 3), y)).dense()
    expected = fxkfac.kfac(program, nn.MSELoss(), ((rows, columns), y)).dense()
    torch.testing.assert_close(found, expected)
