"""Corrections of a weight in two orientations, whose block is a sum of products over each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import zoo_functional  # noqa: F401 - registers its entries
from drawn import classes, rand, seeded
from scipy.optimize import nnls
from torch import Tensor, nn
from zoo import ZOO, Made

import fxkfac
import fxkfac.linalg.rows as linalg_rows
from fxkfac.curvature.corrections import fit

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
N = 4


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: nn.Module = MSE
    kfac: dict[str, Any] = field(default_factory=dict)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(rand(*shape, seed=5))


def there_and_back(*shape: int) -> Callable[[], nn.Module]:
    return lambda: Made(lambda m, x: (x @ m.W).tanh() @ m.W.mT, W=weight(*shape))


def autoencoder() -> nn.Module:
    """Both biases join their term, which is then larger than what the two have in common."""
    return Made(
        lambda m, x: nn.functional.linear(m.encode(x).tanh().cumsum(1), m.encode.weight.T, m.b),
        encode=nn.Linear(4, 3),
        b=(4,),
    )


def tied() -> nn.Module:
    """An embedding that is the head, whose A is a diagonal."""
    return Made(
        lambda m, i: (m.body(m.table(i).cumsum(1)).tanh() @ m.table.weight.T).mT,
        table=nn.Embedding(5, 3, padding_idx=2),
        body=nn.Linear(3, 3),
    )


def unused() -> nn.Module:
    """The gradient at one of the orientations is zero."""
    return Made(lambda m, x: (x * ((x @ m.V) @ m.W.T).sign()) @ m.W, V=weight(4, 3), W=weight(4, 3))


CASES = {
    "square": Case(there_and_back(3, 3), rand(N, 3), rand(N, 3)),
    "groups": Case(there_and_back(2, 3, 2), rand(N, 2, 1, 3), rand(N, 2, 1, 3)),
    "biases": Case(autoencoder, rand(N, 3, 4), rand(N, 3, 4)),
    "biases apart": Case(
        autoencoder, rand(N, 3, 4), rand(N, 3, 4), kfac={"separate_weight_and_bias": True}
    ),
    "reduce": Case(autoencoder, rand(N, 3, 4), rand(N, 3, 4), kfac={"sharing": "reduce"}),
    "tied": Case(tied, classes(N, 4, C=5), classes(N, 4, C=5), CE),
    "tied empirical": Case(
        tied, classes(N, 4, C=5), classes(N, 4, C=5), CE, kfac={"fisher": "empirical"}
    ),
    "no gradient": Case(unused, rand(N, 4), rand(N, 3)),
}
cases = pytest.mark.parametrize("name", CASES)


@cache
def made(name: str) -> tuple[Any, ...]:
    """Program, loss, data, factors, the name of the block and its exact matrix."""
    case = CASES[name]
    model, data = seeded(case.build), (case.x, case.y)
    program = fxkfac.trace(model, case.x)
    factors = fxkfac.kfac(program, case.loss, data, **case.kfac)
    (key,) = [n for n, b in factors.items() if len(getattr(b, "terms", ())) > 1]
    of = fxkfac.exact.empirical_fisher if "fisher" in case.kfac else fxkfac.exact.ggn
    return (
        program,
        case.loss,
        data,
        factors,
        key,
        of(model, case.loss, data, list(factors[key].params)),
    )


def distance(block: Any, C: Tensor) -> float:
    return float((block.dense() - C).norm() / C.norm())


def bases(block: Any) -> Tensor:
    """In columns, vec(p pᵀ) of every eigenvector p of every term, written out."""
    found = []
    for term in block.terms:
        operator = term.operator
        for g, entries in enumerate(term.entries):
            d_in, _ = entries.shape
            Q_A = operator.Q_A
            Q_A = torch.eye(d_in, dtype=operator.dtype) if Q_A is None else Q_A[g % len(Q_A)]
            Q = torch.kron(Q_A.contiguous(), operator.Q_B[g].contiguous())
            P = Q.new_zeros(block.numel, Q.shape[1]).index_put((entries.flatten(),), Q)
            found.append(torch.einsum("ia,ja->ija", P, P).flatten(0, 1))
    return torch.cat(found, 1)


@cases
def test_eigenvalues_are_the_best_non_negative_ones(name):
    """As those that least squares find with the block and all bases written out."""
    program, loss, data, factors, key, C = made(name)
    block = fxkfac.ekfac(program, loss, data, factors)[key]
    _, best = nnls(bases(block).numpy(), C.flatten().numpy(), maxiter=10_000)
    found, before = distance(block, C), distance(factors[key], C)
    assert found <= best / float(C.norm()) + 1e-8
    assert found <= before + 1e-12
    assert all(bool((term.eigenvalues >= 0).all()) for term in block.terms)


@pytest.mark.parametrize("name", ["square", "biases", "tied"])
def test_no_round_leads_away(monkeypatch, name):
    program, loss, data, factors, key, C = made(name)
    seen = [distance(factors[key], C)]
    for rounds in (1, 2, 4):
        monkeypatch.setattr(fit, "ROUNDS", rounds)
        seen.append(distance(fxkfac.ekfac(program, loss, data, factors)[key], C))
    assert all(b <= a + 1e-12 for a, b in pairwise(seen))
    assert seen[-1] < seen[0] - 1e-3


@cases
def test_no_step_of_kfoc_leads_away(name):
    program, loss, data, factors, key, C = made(name)
    seen = [distance(factors[key], C)]
    for steps in (1, 2, 3):
        found = fxkfac.kfoc(program, loss, data, factors, steps=steps, tolerance=0.0)
        seen.append(distance(found[key], C))
        for term in found[key].terms:
            for side in term.sides:
                fxkfac.operators.eigenvalues(side)  # raises where one is negative
    assert all(b <= a + 1e-12 for a, b in pairwise(seen))
    if name != "no gradient":
        assert seen[-1] < seen[0] - 1e-3


def test_kfoc_finds_a_block_that_is_a_sum_of_products():
    """A Hamiltonian's second layer, from which KFAC is far, since its products overlap."""
    entry = ZOO["hamiltonian"]
    model, params = entry.build()
    program, data = entry.trace(model, params, 3), entry.data(3)
    factors = fxkfac.kfac(program, entry.loss, data)
    block = fxkfac.kfoc(program, entry.loss, data, factors, steps=60, tolerance=0.0)["second.W"]
    C = fxkfac.exact.ggn(model, entry.loss, data, list(block.params), params)
    assert distance(factors["second.W"], C) > 0.5
    assert distance(block, C) < 1e-2


def close(found: Any, expected: Any) -> None:
    for name, block in expected.items():
        torch.testing.assert_close(found[name].dense(), block.dense(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["groups", "biases", "tied"])
def test_chunks_and_batches_do_not_matter(monkeypatch, name):
    program, loss, (x, y), factors, _, _ = made(name)
    ekfac = fxkfac.ekfac(program, loss, (x, y), factors)
    kfoc = fxkfac.kfoc(program, loss, (x, y), factors, steps=1)
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    close(fxkfac.ekfac(program, loss, batches, factors), ekfac)
    close(fxkfac.kfoc(program, loss, batches, factors, steps=1), kfoc)
    monkeypatch.setattr(linalg_rows, "LARGEST_CHUNK", 1)
    close(fxkfac.ekfac(program, loss, (x, y), factors, memory=0), ekfac)
    close(fxkfac.kfoc(program, loss, (x, y), factors, steps=1, memory=0), kfoc)


def test_padding_counts_for_nothing():
    """As if every sequence had its own length."""

    def build() -> nn.Module:
        return Made(
            lambda m, i: (m.table(i).tanh() @ m.table.weight.T).mT, table=nn.Embedding(5, 3)
        )

    model, loss = seeded(build), nn.CrossEntropyLoss(reduction="sum")
    x, y, lengths = classes(3, 4, C=5), classes(3, 4, C=5), (2, 4, 1)
    program = fxkfac.trace(model, x)
    real = torch.arange(4) < torch.tensor(lengths).unsqueeze(-1)
    mask = {"mask": lambda x, y: real}
    factors = fxkfac.kfac(program, loss, (x, y), **mask)
    cut = [(a[None, :m], b[None, :m]) for a, b, m in zip(x, y, lengths, strict=True)]
    plain = fxkfac.kfac(program, loss, cut)
    for correct in (fxkfac.ekfac, fxkfac.kfoc):
        close(correct(program, loss, (x, y), factors, **mask), correct(program, loss, cut, plain))


@pytest.mark.parametrize("name", ["square", "biases", "tied"])
def test_what_is_done_with_them(name):
    program, loss, data, factors, key, _ = made(name)
    found = fxkfac.ekfac(program, loss, data, factors)
    block, v = found[key], rand(factors[key].numel, seed=3)
    matrix = block.dense() + 0.3 * torch.eye(block.numel, dtype=v.dtype)
    for damp in ("block", "factors"):
        torch.testing.assert_close(matrix @ block.solve(v, 0.3, damp), v)
    with pytest.raises(fxkfac.errors.FxkfacError, match=r"block\.terms"):
        block.eigenvalues  # noqa: B018 - it is the reading that fails
    assert "Σ of all terms' x gᵀ" in str(found)
    assert key in str(found.report())


def test_influence_takes_the_whole_block():
    program, loss, data, factors, key, _ = made("square")
    found = fxkfac.ekfac(program, loss, data, factors)
    scores = fxkfac.influence(program, loss, found, data, data, 0.1)
    W = dict(program.model.model.named_parameters())[key]
    grads = []
    for x, y in zip(*data, strict=True):
        f = (x @ W).tanh() @ W.mT
        (g,) = torch.autograd.grad(nn.MSELoss(reduction="sum")(f, y), W)
        grads.append(g.flatten())
    G = torch.stack(grads)
    matrix = found[key].dense() + 0.1 * torch.eye(W.numel(), dtype=W.dtype)
    torch.testing.assert_close(scores, -G @ torch.linalg.solve(matrix, G.T))


@pytest.mark.parametrize("name", ["tied", "biases"])
def test_layer_errors(name):
    program, loss, data, factors, key, C = made(name)
    (row,) = fxkfac.layer_errors(program, loss, data, factors, names=[key])
    assert row.errors["KFAC"] == pytest.approx(distance(factors[key], C))
    assert max(row.errors["EKFAC"], row.errors["KFOC"]) < row.errors["KFAC"]
