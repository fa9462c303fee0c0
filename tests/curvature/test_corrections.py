"""EKFAC and KFOC against the exact blocks, written out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import zoo_functional  # noqa: F401 - registers its entries
import zoo_wide  # noqa: F401 - likewise
from drawn import classes, generator, rand, seeded
from quick import one_in, quick
from terms import grouped
from torch import Tensor, nn
from torch.func import functional_call
from zoo import ZOO, Made

import fxkfac
import fxkfac.linalg.rows as linalg_rows
from fxkfac import errors

CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
N = 5


@dataclass(frozen=True)
class Case:
    """A model, one batch, a loss."""

    build: Callable[[], nn.Module]
    x: Any
    y: Tensor
    loss: nn.Module = CE
    batch_axis: int = 0
    kfac: dict[str, Any] = field(default_factory=dict)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Attention(nn.Module):
    """One head by hand: shared axes, equal inputs, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=b) for b in (True, False, True))
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return self.head(torch.tanh(self.up(h)).mean(1))


class Tokens(nn.Module):
    """A table whose rows a datum looks up several times, and a head at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.table(tokens)))
        return self.head(h + h.mean(1, keepdim=True)).movedim(-1, 1)


def experts() -> nn.Module:
    """Batched matrices, one of which another op chooses for each datum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("nei,eio->neo", x, m.W).tanh()
        numbers = (x[:, 0, 0] > 0).long()
        return torch.bmm(m.V[numbers], h.sum(1).unsqueeze(-1)).squeeze(-1)

    return Made(forward, W=(2, 4, 3), V=(2, 3, 3))


def parts() -> nn.Module:
    """Two halves of one matrix, each with an input of its own."""
    return Made(lambda m, x: (x @ m.W[:, :3]).tanh() @ m.W[:3, 3:] + m.b, W=(4, 6), b=(3,))


def twice() -> nn.Module:
    return Made(lambda m, x: m.head(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), head=mlp())


def two_tables() -> nn.Module:
    """One table, looked up in two places."""
    return Made(
        lambda m, x: m.head(torch.tanh(m.table(x[:, :3]).sum(1) * m.table(x[:, 2:]).sum(1))),
        table=nn.Embedding(5, 4),
        head=nn.Linear(4, 3),
    )


CASES = {
    "mlp": Case(mlp, rand(N, 4), classes(N)),
    "mlp apart": Case(
        mlp, rand(N, 4), rand(N, 3), MSE, kfac={"separate_weight_and_bias": True}
    ),
    "cnn": Case(cnn, rand(N, 2, 5, 5), classes(N)),
    "cnn reduce": Case(cnn, rand(N, 2, 5, 5), classes(N), kfac={"sharing": "reduce"}),
    "conv1d": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 3, 4)),
        rand(N, 2, 6), classes(N, 1),
    ),
    "attention": Case(Attention, rand(N, 6, 4), classes(N)),
    "attention reduce": Case(Attention, rand(N, 6, 4), classes(N), kfac={"sharing": "reduce"}),
    "tokens": Case(Tokens, classes(N, 6, C=7), classes(N, 6)),
    "one token": Case(
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)),
        classes(N, C=7), classes(N),
    ),
    "tokens reduce": Case(
        Tokens, classes(N, 6, C=7), classes(N, 6), kfac={"sharing": "reduce"}
    ),
    "one token reduce": Case(
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)),
        classes(N, C=7), classes(N), kfac={"sharing": "reduce"},
    ),
    "two tables reduce": Case(
        two_tables, classes(N, 5, C=5), classes(N), kfac={"sharing": "reduce"}
    ),
    "two tables": Case(two_tables, classes(N, 5, C=5), classes(N)),
    "twice": Case(twice, rand(N, 4), rand(N, 3).sigmoid(), BCE),
    "time major": Case(
        lambda: Made(lambda m, x: m.b(m.a(x).tanh().cumsum(0)).mean(0), a=nn.Linear(4, 3),
                     b=nn.Linear(3, 2)),
        rand(6, N, 4), rand(N, 2), MSE, 1,
    ),
    "attention module": Case(
        lambda: Made(lambda m, x: m.a(x, x, x)[0].mean(0), a=nn.MultiheadAttention(4, 2)),
        rand(5, N, 4), rand(N, 4), MSE, 1,
    ),
    "experts": Case(experts, rand(N, 2, 4), classes(N)),
    "parts": Case(parts, rand(N, 4), classes(N)),
    "lstm": Case(
        lambda: Made(lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 2, batch_first=True),
                     head=nn.Linear(2, 3)),
        rand(N, 4, 3), classes(N),
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


@cache
def made(name: str, fisher: str = "type-2") -> tuple[Case, nn.Module, Any, Any]:
    case = CASES[name]
    model = seeded(case.build)
    program = fxkfac.trace(model, case.x, batch_axis=case.batch_axis)
    data = (case.x, case.y)
    return case, model, program, fxkfac.kfac(program, case.loss, data, fisher=fisher, **case.kfac)


def jacobian(model: nn.Module, x: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    """The prediction, and its Jacobian in these parameters, by plain autodiff."""
    params = {n: p.detach() for n, p in model.named_parameters()}

    def predict(*tensors: Tensor) -> Tensor:
        chosen = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(model, {**params, **chosen}, (x,))

    chosen = tuple(params[n] for n in names)
    f = predict(*chosen).detach()
    J = torch.autograd.functional.jacobian(predict, chosen)
    return f, torch.cat([j.reshape(f.numel(), -1) for j in J], 1)


def exact_block(case: Case, model: nn.Module, names: list[str], fisher: str) -> Tensor:
    """The GGN block, or that of the empirical Fisher, without any help of ours."""
    f, J = jacobian(model, case.x, names)
    if fisher == "type-2":
        H = torch.autograd.functional.hessian(lambda at: case.loss(at, case.y), f)
        return J.T @ H.reshape(f.numel(), -1) @ J
    slope = torch.autograd.functional.jacobian(lambda at: case.loss(at, case.y), f)
    # The loss is R Σ c, so that its gradient is R times each datum's own.
    likelihood = fxkfac.likelihoods.losses.likelihood_of(case.loss)
    R = likelihood.reduction_factor(likelihood.count(f, case.y))
    own = (slope.reshape(f.shape[0], -1, 1) * J.view(f.shape[0], -1, J.shape[1])).sum(1)
    return own.T @ own / R


def in_basis(term: Any, C: Tensor) -> Tensor:
    """The diagonal of a block in the term's basis, (group, in, out)."""
    found = []
    for g, e in enumerate(term.entries):
        d_in, d_out = e.shape
        Q_A = torch.eye(d_in, dtype=C.dtype) if term.Q_A is None else term.Q_A
        Q_A = Q_A[g % len(Q_A)] if Q_A.ndim == 3 else Q_A
        Q_B = term.Q_B[g] if term.Q_B.ndim == 3 else term.Q_B
        Q = torch.kron(Q_A.contiguous(), Q_B.contiguous())
        part = C[e.flatten()][:, e.flatten()]
        found.append((Q * (part @ Q)).sum(0).view(d_in, d_out))
    return torch.stack(found)


def close(found: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)


def same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name, block in expected.items():
        close(found[name].dense(), block.dense())


class TestEigenvalues:
    @cases
    @pytest.mark.parametrize("fisher", quick(["type-2", "empirical"], "empirical".__eq__))
    def test_they_are_the_diagonal_of_the_exact_block_in_its_basis(self, name, fisher):
        case, model, program, factors = made(name, fisher)
        found = fxkfac.ekfac(program, case.loss, (case.x, case.y), factors)
        assert list(found) == list(factors)
        corrected = [b for b in found.values() if isinstance(b, fxkfac.EigenBlock)]
        assert corrected
        for block in corrected:
            C = exact_block(case, model, list(block.params), fisher)
            for term in block.terms:
                close(term.operator.eigenvalues, in_basis(term, C))

    @cases
    def test_the_basis_is_that_of_kfac(self, name):
        case, _, program, factors = made(name)
        found = fxkfac.ekfac(program, case.loss, (case.x, case.y), factors)
        for name, block in found.items():
            if not isinstance(block, fxkfac.EigenBlock):
                assert block is not None
                close(block.dense(), factors[name].dense())
                continue
            for mine, term in zip(block.terms, factors[name].terms, strict=True):
                A, B = term.A, term.B
                turned = mine.Q_B.mT @ B @ mine.Q_B
                close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
                if A.ndim == 1:
                    assert mine.Q_A is None
                    continue
                turned = mine.Q_A.mT @ A @ mine.Q_A
                close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))

    @pytest.mark.parametrize("name", ["mlp", "cnn", "tokens", "two tables", "time major"])
    def test_batches_add_up(self, name):
        case, _, program, factors = made(name)
        whole = fxkfac.ekfac(program, case.loss, (case.x, case.y), factors)
        parts = [
            (case.x.narrow(case.batch_axis, start, size), case.y[start : start + size])
            for start, size in ((0, 2), (2, 1), (3, 2))
        ]
        found = fxkfac.ekfac(program, case.loss, iter(parts), factors)
        same(found, whole)
        assert (found.n, found.count) == (whole.n, whole.count)

    @cases
    @pytest.mark.parametrize(("largest", "memory"), [(1, 2**30), (150, 0)])
    def test_chunks_do_not_matter(self, monkeypatch, name, largest, memory):
        case, _, program, factors = made(name)
        data = (case.x, case.y)
        ekfac = fxkfac.ekfac(program, case.loss, data, factors)
        kfoc = fxkfac.kfoc(program, case.loss, data, factors, steps=1)
        monkeypatch.setattr(linalg_rows, "LARGEST_CHUNK", largest)
        same(fxkfac.ekfac(program, case.loss, data, factors, memory=memory), ekfac)
        same(fxkfac.kfoc(program, case.loss, data, factors, steps=1, memory=memory), kfoc)

    @pytest.mark.parametrize("fisher", ["mc", "curvature-propagation"])
    def test_a_generator_draws_the_same_labels_again(self, fisher):
        """The factors of one datum are exact, so that there is nothing to correct."""
        program, data = fxkfac.trace(seeded(mlp), rand(2, 4)), (rand(1, 4), classes(1))
        options = {"fisher": fisher, "mc_samples": 7}
        factors = fxkfac.kfac(program, CE, data, generator=generator(), **options)
        same(fxkfac.ekfac(program, CE, data, factors, generator=generator()), factors)
        same(fxkfac.kfoc(program, CE, data, factors, generator=generator(), steps=2), factors)
        other = fxkfac.ekfac(program, CE, data, factors, generator=generator(1))
        assert (other.dense() - factors.dense()).norm() > 0.1 * factors.dense().norm()

    @pytest.mark.parametrize(("fisher", "samples"), [("type-1", 1), ("mc", 4000)])
    def test_type_1_equals_type_2_and_mc_converges(self, fisher, samples):
        case, _, program, factors = made("mlp")
        data = (case.x, case.y)
        expected = fxkfac.ekfac(program, CE, data, factors)
        other = fxkfac.kfac(program, CE, data, fisher=fisher, mc_samples=samples)
        found = fxkfac.ekfac(program, CE, data, other)
        error = (found.dense() - expected.dense()).norm() / expected.dense().norm()
        assert error < (1e-10 if fisher == "type-1" else 0.1)

    def test_parameters_in_the_place_of_the_models_own(self):
        case, model, program, _ = made("mlp")
        params = {n: rand(*p.shape, seed=9) for n, p in model.named_parameters()}
        data = (case.x, case.y)
        factors = fxkfac.kfac(program, CE, data, params)
        found = fxkfac.ekfac(program, CE, data, factors, params)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.load_state_dict(params)
        for block in found.values():
            C = exact_block(case, model, list(block.params), "type-2")
            close(block.terms[0].operator.eigenvalues, in_basis(block.terms[0], C))
        model.load_state_dict(before)

    def test_exact_blocks_stay_as_they_are(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
        data = (rand(N, 4), classes(N))
        program = fxkfac.trace(model, data[0], structure={"2.*": "dense"})
        factors = fxkfac.kfac(program, CE, data)
        for found in (
            fxkfac.ekfac(program, CE, data, factors),
            fxkfac.kfoc(program, CE, data, factors, steps=1),
        ):
            assert torch.equal(found["1.weight"].diagonal, factors["1.weight"].diagonal)
            assert torch.equal(found["2.weight"].matrix, factors["2.weight"].matrix)


def rearranged(C: Tensor, e: Tensor, diagonal: bool) -> Tensor:
    """Rows for the entries of A, columns for those of B, of one group with entries (in, out)."""
    d_in, d_out = e.shape
    part = C[e.flatten()][:, e.flatten()].view(d_in, d_out, d_in, d_out).transpose(1, 2)
    part = part.reshape(d_in, d_in, d_out**2)
    return part.diagonal(dim1=0, dim2=1).mT if diagonal else part.flatten(0, 1)


class TestNearestProduct:
    @cases
    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_it_is_the_first_singular_pair(self, name, fisher):
        """Where the second singular value is well below, so that iteration has converged."""
        case, model, program, factors = made(name, fisher)
        found = fxkfac.kfoc(
            program, case.loss, (case.x, case.y), factors, steps=40, tolerance=1e-13
        )
        for block in found.values():
            if not isinstance(block, fxkfac.Block):
                continue
            C = exact_block(case, model, list(block.params), fisher)
            for term in block.terms:
                for e, A, B in zip(term.entries, *grouped(term), strict=True):
                    U, S, V = torch.linalg.svd(rearranged(C, e, term.A.ndim == 1))
                    if len(S) > 1 and S[1] > 0.7 * S[0]:
                        continue
                    best = S[0] * torch.outer(U[:, 0], V[0])
                    a = A.diagonal() if term.A.ndim == 1 else A.flatten()
                    error = (torch.outer(a, B.flatten()) - best).norm()
                    assert error <= 1e-5 * S[0], name

    @pytest.mark.parametrize("name", ["mlp", "attention", "tokens", "cnn"])
    def test_a_has_the_trace_of_kfacs(self, name):
        case, _, program, factors = made(name)
        found = fxkfac.kfoc(program, case.loss, (case.x, case.y), factors, steps=1)
        for name, block in found.items():
            for mine, term in zip(block.terms, factors[name].terms, strict=True):
                A, B = (grouped(t)[0].diagonal(dim1=1, dim2=2).sum(1) for t in (mine, term))
                close(A, B)

    def test_batches_add_up_in_every_step(self):
        case, _, program, factors = made("attention")
        whole = fxkfac.kfoc(program, CE, (case.x, case.y), factors, steps=3)
        batches = [(case.x[:2], case.y[:2]), (case.x[2:], case.y[2:])]
        same(fxkfac.kfoc(program, CE, batches, factors, steps=3), whole)

    def test_it_stops_when_nothing_grows(self):
        """One datum without shared axes: KFAC is exact, and one step finds nothing better."""
        seen = []

        class Data(list):
            def __iter__(self):
                seen.append(1)
                return super().__iter__()

        data = Data([(rand(1, 4), classes(1)), (rand(1, 4), classes(1))])
        program = fxkfac.trace(seeded(mlp), rand(2, 4))
        factors = fxkfac.kfac(program, CE, data)
        seen.clear()
        same(fxkfac.kfoc(program, CE, data, factors, steps=30), factors)
        assert len(seen) == 2


@cases
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_never_farther_than_kfac(name, fisher):
    case, model, program, factors = made(name, fisher)
    data = (case.x, case.y)
    ekfac = fxkfac.ekfac(program, case.loss, data, factors)
    kfoc = fxkfac.kfoc(program, case.loss, data, factors, steps=2)
    for name, block in factors.items():
        C = exact_block(case, model, list(block.params), fisher)
        before, *after = ((b[name].dense() - C).norm() for b in (factors, ekfac, kfoc))
        assert all(a <= before + 1e-12 * C.norm() for a in after), name


def dead_group() -> nn.Module:
    """One of whose groups has neither inputs nor gradients."""
    alive = torch.tensor([1.0, 1.0, 0.0, 0.0])
    return Made(
        lambda m, x: (m.conv((x * alive).unsqueeze(-1)).squeeze(-1) * alive).tanh(),
        conv=nn.Conv1d(4, 4, 1, groups=2),
    )


def tied_pair() -> nn.Module:
    return Made(lambda m, x: x @ m.W @ m.W.mT, W=(4, 3))


@pytest.mark.parametrize("scale", [1e-19, 1e-12, 1e10])
@pytest.mark.parametrize("build", [mlp, tied_pair, dead_group])
def test_kfoc_has_room_in_float32_for_small_and_for_large_gradients(build, scale):
    """Blocks scale with the square of the outputs, and nothing else changes."""
    model = seeded(build).float()
    x, found = rand(6, 4).float(), []
    for s in (1.0, scale):
        program = fxkfac.trace(
            lambda p, x, s=s: s * functional_call(model, p, (x,)), x, weights(model)
        )
        data = (x, s * rand(6, *model(x).shape[1:]).float())
        kfoc = fxkfac.kfoc(program, MSE, data, fxkfac.kfac(program, MSE, data), steps=3)
        found.append(
            {n: fxkfac.operators.to_dtype(b.operator, torch.float64) for n, b in kfoc.items()}
        )
    for name, op in found[0].items():
        dense = fxkfac.operators.to_dense(found[1][name]) / scale**2
        torch.testing.assert_close(dense, fxkfac.operators.to_dense(op), rtol=1e-3, atol=1e-4)


class TestSolve:
    @pytest.mark.parametrize("name", ["mlp apart", "cnn", "tokens", "parts", "experts"])
    def test_it_inverts_what_dense_shows(self, name):
        case, _, program, factors = made(name)
        found = fxkfac.ekfac(program, case.loss, (case.x, case.y), factors)
        for block in found.values():
            v = rand(block.numel, seed=3)
            matrix = block.dense() + 0.3 * torch.eye(block.numel, dtype=v.dtype)
            for damp in ("block", "factors"):
                close(matrix @ block.solve(v, 0.3, damp), v)

    def test_a_singular_block_needs_damping(self):
        case, _, program, factors = made("tokens")
        block = fxkfac.ekfac(program, CE, (case.x, case.y), factors)["table.weight"]
        with pytest.raises(errors.OptionError, match="singular"):  # the row of padding_idx
            block.solve(rand(block.numel), 0.0)

    def test_all_blocks_together(self):
        case, model, program, factors = made("attention")
        found = fxkfac.ekfac(program, CE, (case.x, case.y), factors)
        gradients = {n: rand(*p.shape, seed=2) for n, p in model.named_parameters()}
        solved = found.solve(gradients, 0.1)
        matrix = found.dense()
        v, s = (torch.cat([t[n].flatten() for n in found.shapes]) for t in (gradients, solved))
        close(matrix @ s + 0.1 * s, v)

    def test_parts_have_bases_of_their_own(self):
        case, _, program, factors = made("parts")
        block = fxkfac.ekfac(program, CE, (case.x, case.y), factors)["W"]
        assert len(block.terms) > 1
        with pytest.raises(errors.FxkfacError, match=r"block\.terms"):
            block.eigenvalues  # noqa: B018 - it is the reading that fails


LENGTHS = (3, 6, 2, 4, 1)


class TestPadding:
    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_a_mask_cuts_each_datum(self, fisher):
        """As if each had its own length, whatever its targets behind."""

        def tagger() -> nn.Module:
            return Made(
                lambda m, x: m.head(m.mix(m.table(x)).tanh()).movedim(-1, 1),
                table=nn.Embedding(7, 4), mix=nn.Linear(4, 4), head=nn.Linear(4, 3),
            )  # fmt: skip

        model, loss = seeded(tagger), nn.CrossEntropyLoss(reduction="sum")
        tokens, labels = classes(N, 6, C=7), classes(N, 6)
        program = fxkfac.trace(model, tokens)
        real = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(-1)
        options = {"fisher": fisher, "mask": lambda x, y: real}
        factors = fxkfac.kfac(program, loss, (tokens, labels), **options)
        mask = {"mask": options["mask"]}
        found = fxkfac.ekfac(program, loss, (tokens, labels), factors, **mask)
        nearest = fxkfac.kfoc(program, loss, (tokens, labels), factors, steps=2, **mask)
        cut = [(t[None, :m], y[None, :m]) for t, y, m in zip(tokens, labels, LENGTHS, strict=True)]
        plain = fxkfac.kfac(program, loss, cut, fisher=fisher)
        same(found, fxkfac.ekfac(program, loss, cut, plain))
        same(nearest, fxkfac.kfoc(program, loss, cut, plain, steps=2))

    def test_ignored_targets(self):
        case = CASES["tokens"]
        y = case.y.clone()
        y[:, 0] = -100
        y[2, 3:] = -100
        model, loss = seeded(Tokens), nn.CrossEntropyLoss()
        program = fxkfac.trace(model, case.x)
        factors = fxkfac.kfac(program, loss, (case.x, y))
        found = fxkfac.ekfac(program, loss, (case.x, y), factors)
        for block in found.values():
            C = exact_block(Case(Tokens, case.x, y), model, list(block.params), "type-2")
            close(block.terms[0].operator.eigenvalues, in_basis(block.terms[0], C))


@pytest.fixture(scope="module")
def plain():
    program, data = fxkfac.trace(seeded(mlp), rand(2, 4)), (rand(N, 4), classes(N))
    return program, data, fxkfac.kfac(program, CE, data)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: nn.functional.linear(x, m.W, m.W[:, 1]).tanh(),
        lambda m, x: (x @ m.W + m.W[0]).tanh(),
        lambda m, x: (x @ m.W + torch.cat([m.b, m.b])).tanh(),
    ],
    ids=["a column", "a row", "a bias twice"],
)
@pytest.mark.parametrize("correct", [fxkfac.ekfac, fxkfac.kfoc])
def test_a_bias_with_entries_that_come_twice_is_refused(correct: Any, forward: Any) -> None:
    model = seeded(lambda: Made(forward, W=(4, 4), b=(2,)))
    data = rand(N, 4), rand(N, 4)
    program = fxkfac.trace(model, data[0])
    with pytest.raises(errors.UnsupportedUse, match="come several times"):
        correct(program, MSE, data, fxkfac.kfac(program, MSE, data))


@pytest.mark.parametrize("correct", [fxkfac.ekfac, fxkfac.kfoc])
def test_a_weight_without_columns(correct: Any) -> None:
    """It has a block without entries; the others are those of a model without it."""
    data = rand(N, 4), classes(N)
    blocks = []
    for forward in (lambda m, x: torch.cat([x @ m.W, x], 1) @ m.V, lambda m, x: x @ m.V):
        model = seeded(lambda f=forward: Made(f, W=(4, 0), V=(4, 3)))  # type: ignore[misc]
        program = fxkfac.trace(model, data[0], unsupported="skip")
        blocks.append(correct(program, CE, data, fxkfac.kfac(program, CE, data))["V"].dense())
    torch.testing.assert_close(*blocks)


def test_a_singular_block_is_singular() -> None:
    """One class too many, as softmax has: Λ holds squares of rounding, which are zeros."""
    model, data = seeded(lambda: nn.Linear(4, 3)), (rand(40, 4), classes(40))
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, CE, data)
    corrected = fxkfac.ekfac(program, CE, data, factors)
    operator = corrected.operator()
    assert fxkfac.operators.summary(operator).rank == 10
    assert fxkfac.operators.logdet(operator) == -torch.inf
    assert fxkfac.operators.condition(operator) == torch.inf
    gradients = {name: rand(*p.shape) for name, p in model.named_parameters()}
    with pytest.raises(errors.OptionError, match="the operator is singular"):
        corrected.solve(gradients, damping=0.0)
    with pytest.raises(errors.OptionError, match="the operator is singular"):
        fxkfac.influence(program, CE, corrected, data, data, 0.0)


class TestRefusals:
    @pytest.mark.parametrize("function", [fxkfac.ekfac, fxkfac.kfoc])
    def test_factors_that_were_computed_otherwise(self, plain, function):
        program, data, factors = plain
        with pytest.raises(errors.MergeError, match="loss="):
            function(program, nn.CrossEntropyLoss(reduction="sum"), data, factors)
        with pytest.raises(errors.MergeError, match="masked=False"):
            function(program, CE, data, factors, mask=lambda x, y: y)
        other = fxkfac.trace(seeded(lambda: nn.Linear(4, 3)), rand(2, 4))
        with pytest.raises(errors.MergeError, match=r"parameters=.*0\.weight"):
            function(other, CE, data, factors)
        dense = fxkfac.trace(seeded(mlp), rand(2, 4), structure={"2.*": "dense"})
        with pytest.raises(errors.MergeError, match=r"structures=.*2\.weight"):
            function(dense, CE, data, factors)
        with pytest.raises(errors.OptionError, match="factors is of type dict"):
            function(program, CE, data, dict(factors))
        with pytest.raises(errors.OptionError, match="factors is of type Corrected"):
            function(program, CE, data, fxkfac.ekfac(program, CE, data, factors))

    @pytest.mark.parametrize("function", [fxkfac.ekfac, fxkfac.kfoc])
    def test_no_data_and_nothing_sent_back(self, plain, function):
        program, data, factors = plain
        with pytest.raises(errors.DataError, match="no batch"):
            function(program, CE, [], factors)
        with pytest.raises(errors.DataError, match="ignored"):
            function(program, CE, (data[0], torch.full_like(data[1], -100)), factors)
        forward = fxkfac.kfac(program, CE, data, fisher="forward-only")
        with pytest.raises(errors.OptionError, match="forward-only"):
            function(program, CE, data, forward)

    def test_data_that_are_used_up(self, plain):
        program, data, factors = plain
        with pytest.raises(errors.DataError, match="two passes"):
            fxkfac.kfoc(program, CE, iter([data]), factors)

    @pytest.mark.parametrize("steps", [0, 1.5, True])
    def test_steps(self, plain, steps):
        program, data, factors = plain
        with pytest.raises(errors.OptionError, match="steps="):
            fxkfac.kfoc(program, CE, data, factors, steps=steps)
        with pytest.raises(errors.OptionError, match="tolerance="):
            fxkfac.kfoc(program, CE, data, factors, tolerance=float("nan"))

    @pytest.mark.parametrize("function", [fxkfac.ekfac, fxkfac.kfoc])
    def test_parts_that_overlap(self, function):
        build = lambda: Made(lambda m, x: (x @ m.W).tanh() @ m.W[:3, :2], W=(4, 3))  # noqa: E731
        data = (rand(N, 4), rand(N, 2))
        program = fxkfac.trace(seeded(build), data[0])
        factors = fxkfac.kfac(program, MSE, data)
        with pytest.raises(errors.UnsupportedUse, match=r"W: the same entries .*'diagonal'"):
            function(program, MSE, data, factors)

    @pytest.mark.parametrize("function", [fxkfac.ekfac, fxkfac.kfoc])
    def test_coupled_data(self, function):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)))
        data = (rand(N, 4), classes(N))
        program = fxkfac.trace(model, data[0])
        factors = fxkfac.kfac(program, CE, data)
        with pytest.raises(errors.BatchAxisError, match="batch norm in train mode"):
            function(program, CE, data, factors)

    def test_numbers_that_are_not_finite(self, plain):
        program, data, factors = plain
        with pytest.raises(errors.NonFiniteError, match="batch 1"):
            fxkfac.ekfac(program, CE, [data, (data[0] * 1e200, data[1])], factors)


def test_the_order_is_said():
    case, _, program, factors = made("attention")
    text = str(fxkfac.ekfac(program, CE, (case.x, case.y), factors))
    for name in factors:
        assert name in text
    assert "((x Q_A)²)ᵀ (g Q_B)²" in text  # the head has one row for each datum
    assert "then Σ_s" in text


has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


@pytest.mark.skipif(not has_compiler, reason="inductor needs a C++ compiler")
@pytest.mark.slow
def test_compiled_passes():
    case, _, program, factors = made("mlp")
    data = (case.x, case.y)
    found = fxkfac.ekfac(program, CE, data, factors, backend="inductor")
    same(found, fxkfac.ekfac(program, CE, data, factors))


PLAIN = {
    name: entry
    for name, entry in ZOO.items()
    if entry.expected == "right"
    and entry.reduce
    and not (entry.coupled or entry.random or entry.target_axis)
    and "batch_axis" not in entry.trace_options
    and "derived" not in entry.trace_options.get("structure", {}).values()
}
REFUSED = {"overlapping"}  # a weight is used in parts that have some entries in common


@pytest.mark.parametrize("name", quick(PLAIN, one_in(16)))
def test_never_farther_than_kfac_in_the_zoo(name):
    entry = PLAIN[name]
    model, params = entry.build()
    program, data = entry.trace(model, params, 3), entry.data(3)
    factors = fxkfac.kfac(program, entry.loss, data)
    if name in REFUSED:
        with pytest.raises(errors.UnsupportedUse, match="the same entries"):
            fxkfac.ekfac(program, entry.loss, data, factors)
        return
    ekfac = fxkfac.ekfac(program, entry.loss, data, factors)
    kfoc = fxkfac.kfoc(program, entry.loss, data, factors, steps=1)
    rounding = 1e-5 if entry.tolerance > 1e-9 else 1e-12
    for key, block in factors.items():
        C = fxkfac.exact.ggn(model, entry.loss, data, list(block.params), params)
        before, *after = ((b[key].dense() - C).norm() for b in (factors, ekfac, kfoc))
        assert all(a <= before + rounding * C.norm() for a in after), key
