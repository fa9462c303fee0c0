"""The curvature of parameters as an operator, against its matrix put together by hand."""

from __future__ import annotations

import pytest
import torch
from drawn import F64, rand, seeded
from factor_cases import (
    EVERY,
    embedding,
    matrix,
    mlp,
    overlapping_slices,
    three_slices,
    tied,
    whole,
)
from torch import nn

import fxkfac
from fxkfac import operators as ops
from fxkfac.errors import OptionError, ParameterError, UnknownParameter

Damping = ops.Damping
close = torch.testing.assert_close


@pytest.fixture(scope="module", params=EVERY, ids=lambda make: make.__name__)
def factors(request):
    return request.param()


def draw(factors, names, *batch, seed=0):
    return {n: rand(*batch, *factors.shapes[n], seed=seed + k) for k, n in enumerate(names)}


def flat(tensors, names, batch=0):
    return torch.cat([tensors[name].flatten(batch) for name in names], -1)


def test_a_block_is_the_sum_of_its_terms(factors):
    for block in factors.values():
        close(block.dense(), matrix(block))
        close(ops.to_dense(block.operator), matrix(block))
        close(ops.diagonal(block.operator), matrix(block).diagonal())
        close(ops.norm(block.operator), matrix(block).norm())


def test_products_by_name(factors):
    C, names = whole(factors)
    op = factors.operator()
    assert list(op.shapes) == names
    x = draw(factors, names)
    found = ops.product(op, dict(reversed(x.items())))
    assert list(found) == names[::-1]
    assert all(found[n].shape == x[n].shape for n in names)
    close(flat(found, names), C @ flat(x, names))
    many = draw(factors, names, 2, 3)
    close(flat(ops.product(op, many), names, 2), flat(many, names, 2) @ C)


def test_functions_of_the_whole(factors):
    C, names = whole(factors)
    op = factors.operator()
    close(ops.to_dense(op), C)
    close(ops.trace(op), C.trace())
    close(ops.norm(op), C.norm())
    close(ops.inner(op, op), C.square().sum())
    close(flat(ops.diagonal(op), names), C.diagonal())
    λ = torch.linalg.eigvalsh(C).clamp_min(0)
    close(ops.eigenvalues(op).sort().values, λ, rtol=1e-8, atol=1e-10)
    close(ops.to_dense(ops.add(op, ops.scaled(op, 2.0))), 3 * C)
    found, Q = ops.eigh(op)
    Q = ops.to_dense(Q)
    close(Q @ torch.diag(found) @ Q.T, C, rtol=1e-8, atol=1e-10)
    half = ops.to_dense(ops.power(op, 0.5))
    close(half @ half, C, rtol=1e-8, atol=1e-8)


def test_functions_of_the_damped_whole(factors):
    C, names = whole(factors)
    C = C + 0.1 * torch.eye(len(C), dtype=F64)
    op = ops.damped(factors.operator(), Damping(0.1))
    x = draw(factors, names, 2)
    solved = ops.solve(op, x)
    close(flat(solved, names, 1) @ C, flat(x, names, 1))
    close(ops.logdet(op), torch.logdet(C))
    close(ops.condition(op), torch.linalg.cond(C))
    L = ops.to_dense(ops.cholesky(op))
    close(L, torch.linalg.cholesky(C))
    root = ops.to_dense(ops.inverse_root(op))
    close(root @ root.T @ C, torch.eye(len(C), dtype=F64))
    draws = ops.sample(op, 4, torch.Generator().manual_seed(0))
    noise = torch.randn(4, len(C), dtype=F64, generator=torch.Generator().manual_seed(0))
    close(flat(draws, names, 1), noise @ root.T)
    assert {n: tuple(t.shape) for n, t in draws.items()} == {
        n: (4, *factors.shapes[n]) for n in names
    }


@pytest.mark.parametrize("damp", ops.DAMP)
def test_solve_is_that_of_the_damped_matrix(factors, damp):
    _, names = whole(factors)
    gradients = draw(factors, names)
    solved = factors.solve(gradients, damping=0.2, damp=damp)
    assert list(solved) == names
    for block in factors.values():
        C = damped_matrix(block, damp)
        found, g = flat(solved, block.params), flat(gradients, block.params)
        close(C @ found, g, rtol=1e-8, atol=1e-8)
        close(C @ block.solve(g, 0.2, damp), g, rtol=1e-8, atol=1e-8)


def damped_matrix(block, damp):
    """What `Damping` says, entry by entry."""
    C = matrix(block)
    eye = torch.eye(len(C), dtype=F64)
    if damp == "floor":
        λ, Q = torch.linalg.eigh(C)
        return Q @ torch.diag(λ.clamp_min(0.2)) @ Q.T
    if damp == "mean":
        return C + 0.2 * C.trace() / len(C) * eye
    if damp == "block" or not isinstance(block, fxkfac.Block):
        return C + 0.2 * eye
    total, used = torch.zeros_like(C), torch.zeros(len(C), dtype=F64)
    for term in block.terms:
        for g, entries in enumerate(term.entries):
            A = term.A if term.A.ndim < 3 else term.A[g % len(term.A)]
            A = torch.diag(A) if A.ndim == 1 else A
            B = term.B if term.B.ndim < 3 else term.B[g]
            π = 1.0
            if damp == "pi" and A.trace() > 0 and B.trace() > 0:
                π = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
            A = A + π * 0.2**0.5 * torch.eye(len(A), dtype=F64)
            B = B + 0.2**0.5 / π * torch.eye(len(B), dtype=F64)
            P = eye[entries.flatten()]
            total += P.T @ torch.kron(A, B) @ P
            used += P.sum(0)
    return total + torch.diag(0.2 * (used == 0).to(F64))


def test_slices_need_no_matrix_of_their_parameter(monkeypatch):
    """Three products that share no entry are solved by their own eigenvalues."""
    from fxkfac.linalg.operators import spectra

    monkeypatch.setattr(spectra, "LARGEST_DENSE", 0)
    found = three_slices()
    found.solve(draw(found, ["W"]), damping=0.1)
    with pytest.raises(OptionError, match=r"the block of W: Sum(.|\n)*expected at most 0"):
        overlapping_slices().solve({"W": rand(4, 4)}, damping=0.1)
    tied().solve({"W": rand(4, 3)}, damping=0.1, damp="factors")


def test_the_operator_of_some_names():
    factors = mlp()
    op = factors.operator("2.bias", "2.weight")
    assert list(op.shapes) == ["2.weight", "2.bias"]
    close(ops.to_dense(op), factors["2.weight"].dense())


def test_float32_gradients_are_solved_in_the_factors_dtype():
    factors = mlp()
    gradients = {n: t.float() for n, t in draw(factors, factors.shapes).items()}
    solved = factors.solve(gradients, damping=1e-3)
    expected = factors.solve({n: g.double() for n, g in gradients.items()}, damping=1e-3)
    for name, found in solved.items():
        assert found.dtype == torch.float32
        close(found, expected[name].float())


def test_float64_for_factors_of_float32():
    factors = mlp()
    op = ops.to_dtype(factors.operator(), torch.float32)
    x = draw(factors, factors.shapes)
    double = ops.damped(ops.to_dtype(op, F64), Damping(0.1))
    found = ops.solve(double, x)
    C = ops.to_dense(double)
    close(C @ flat(found, op.shapes), flat(x, op.shapes))


def test_autocast_is_the_models():
    factors = mlp()
    op, x = ops.to_dtype(factors.operator(), torch.float32), draw(factors, factors.shapes)
    functions = [
        lambda: flat(ops.product(op, x), x),
        lambda: flat(ops.solve(ops.damped(op, Damping(0.1)), x), x),
        lambda: ops.to_dense(ops.diagonalised(op)),
        lambda: flat(ops.diagonal(ops.diagonalised(op)), x),
    ]
    for function in functions:
        expected = function()
        with torch.autocast("cpu"):
            assert torch.equal(function(), expected)


def test_a_penalty_is_differentiable():
    """½ (θ − θ*)ᵀ C (θ − θ*) as in elastic weight consolidation."""
    factors = mlp()
    op, x = factors.operator(), draw(factors, factors.shapes)
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    product = ops.product(op, leaves)
    penalty = sum((leaves[n] * product[n]).sum() for n in leaves) / 2
    gradients = torch.autograd.grad(penalty, list(leaves.values()))
    close(flat(dict(zip(leaves, gradients, strict=True)), leaves), flat(ops.product(op, x), leaves))
    assert not any(t.requires_grad for t in factors.solve(leaves, damping=1.0).values())


def test_scipy_solves_with_it():
    sparse = pytest.importorskip("scipy.sparse.linalg")
    factors = mlp()
    C, names = whole(factors)
    found = ops.to_scipy(factors.operator())
    b = flat(draw(factors, names), names).numpy()
    close(torch.from_numpy(found @ b), C @ torch.from_numpy(b))
    largest = sparse.eigsh(found, k=1, return_eigenvectors=False)
    close(torch.tensor(largest[0]), torch.linalg.eigvalsh(C).max())


def test_a_product_by_name_compiles_in_one_graph():
    factors = mlp()
    op, x = factors.operator(), draw(factors, factors.shapes)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: ops.product(op, v), fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), ops.product(op, x)
    close(flat(found, x), flat(expected, x))


class TestRefusals:
    def test_names(self):
        factors = mlp()
        op, x = factors.operator(), draw(factors, factors.shapes)
        with pytest.raises(UnknownParameter, match="'V'"):
            factors.operator("V")
        with pytest.raises(UnknownParameter, match=r"0.weight(.|\n)*0.bias(.|\n)*pass them all"):
            factors.operator("0.weight")
        with pytest.raises(UnknownParameter, match=r"\['0.bias'\] are missing"):
            ops.product(op, {n: t for n, t in x.items() if n != "0.bias"})
        with pytest.raises(UnknownParameter, match=r"\['V'\] unknown"):
            ops.solve(ops.damped(op, Damping(1.0)), {**x, "V": rand(2)})
        with pytest.raises(UnknownParameter):
            factors.solve({}, damping=1.0)

    def test_shapes(self):
        factors = mlp()
        op, x = factors.operator(), draw(factors, factors.shapes)
        with pytest.raises(ParameterError, match=r"'0.weight' has shape \(4, 3\)(.|\n)*\(3, 4\)"):
            ops.product(op, {**x, "0.weight": rand(4, 3)})
        with pytest.raises(ParameterError, match="one for all"):
            ops.product(op, {**x, "0.weight": rand(2, 3, 4)})
        with pytest.raises(ParameterError, match="acts on arrays"):
            ops.product(factors["0.weight"].operator, x)
        with pytest.raises(ParameterError, match="have 2 entries"):
            ops.Named(ops.Diagonal(torch.ones(3)), {"W": (2,)})

    def test_operators_over_other_names(self):
        factors = mlp()
        with pytest.raises(ParameterError, match="same parameters"):
            ops.add(factors.operator("0.weight", "0.bias"), factors.operator())

    def test_a_singular_block_is_named(self):
        factors = embedding()
        gradients = draw(factors, factors.shapes)
        with pytest.raises(OptionError, match=r"block of 0.weight: (.|\n)*singular"):
            factors.solve(gradients, damping=0.0)
        with pytest.raises(OptionError, match=r"block of 0.weight: (.|\n)*singular"):
            factors["0.weight"].solve(gradients["0.weight"].flatten(), 0.0)


def test_nothing_of_the_factors_is_changed():
    factors = mlp()
    block = factors["0.weight"]
    before = block.A.clone(), block.B.clone()
    for damp in ops.DAMP:
        factors.solve(draw(factors, factors.shapes), damping=0.1, damp=damp)
    assert torch.equal(block.A, before[0])
    assert torch.equal(block.B, before[1])


class Scaled(nn.Module):
    """A scale without axes, as of a residual branch or a temperature."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3, dtype=F64), nn.Parameter(rand(()))

    def forward(self, x):
        return self.layer(x) * self.scale


def test_a_parameter_without_axes():
    model, x = seeded(Scaled), rand(5, 4)
    factors = fxkfac.kfac(fxkfac.trace(model, x), nn.MSELoss(), (x, rand(5, 3)))
    tensors = {name: rand(2, *p.shape) for name, p in model.named_parameters()}
    operator = factors.operator(*tensors)
    found = ops.product(operator, tensors)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in tensors.items()}
    close(found["scale"], tensors["scale"] * factors["scale"].diagonal)
    damped = ops.damped(operator, Damping(0.1))
    close(ops.solve(damped, ops.product(damped, tensors)), tensors)
    assert ops.diagonal(operator)["scale"].shape == ()
