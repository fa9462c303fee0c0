"""Every operator × every law, over drawn shapes, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operator_cases import F64, REGULAR, SINGULAR, Source, matrix
from torch import Tensor

from fxkfac.errors import FxkfacError, NonFiniteError, OptionError, ParameterError
from fxkfac.linalg import operators as ops
from fxkfac.linalg.operators import Damping, Operator
from fxkfac.linalg.operators.symmetric import rounded_squares

Make = Callable[[Source, int, int, int], Operator]
close = torch.testing.assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(make: Make) -> str:
    return make.__name__


every = pytest.mark.parametrize("make", [*REGULAR, *SINGULAR], ids=ids)
every_regular = pytest.mark.parametrize("make", REGULAR, ids=ids)
every_singular = pytest.mark.parametrize("make", SINGULAR, ids=ids)


def shapes(law: Callable[..., None]) -> Callable[..., None]:
    """A law for drawn (group, in, out) and seeds; for two of them always."""
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
    drawn = given(size=sizes, seed=st.integers(0, 1000))(law)
    # Of the second one all pivots are well above zero, though the matrix is singular.
    drawn = example(size=(1, 1, 1), seed=0)(example(size=(1, 2, 1), seed=134)(drawn))
    return settings(max_examples=6)(drawn)


def flat(x: Tensor, op: Operator) -> Tensor:
    return x.reshape(*x.shape[: x.ndim - len(op.shape)], op.numel)


def off(found: Tensor, expected: Tensor) -> None:
    close(found, expected, rtol=1e-9, atol=1e-9)


@every
@shapes
def test_products_are_those_of_the_matrix(make, size, seed):
    s = Source(seed)
    op = make(s, *size)
    C, x = matrix(op), s.rand(2, 3, *op.shape)
    close(flat(ops.product(op, x), op), flat(x, op) @ C.T)
    close(ops.product(op, x[0, 0]).flatten(), C @ x[0, 0].flatten())
    assert ops.product(op, x[:0]).shape == (0, 3, *op.shape)
    assert ops.transpose(op) is op or not isinstance(op, ops.Factor)
    close(matrix(ops.transpose(op)), C)


@every
@shapes
def test_entries_are_those_of_the_matrix(make, size, seed):
    op = make(Source(seed), *size)
    C = matrix(op)
    close(ops.to_dense(op), C)
    assert op.numel == len(C)
    close(ops.diagonal(op), C.diagonal().view(op.shape))
    close(ops.trace(op), C.trace())
    close(ops.norm(op), torch.linalg.matrix_norm(C))


@every
@shapes
def test_inner_products_with_every_kind(make, size, seed):
    s = Source(seed)
    op = make(s, *size)
    C, x = matrix(op), s.rand(*op.shape).square()
    others = [op, ops.Diagonal(x), make(s, *size), ops.add(ops.Diagonal(x), make(s, *size))]
    if len(op.shape) == 1:
        others += [ops.Dense(s.regular(1, op.numel)[0])]
    for other in others:
        expected = (C * matrix(other)).sum()
        off(ops.inner(op, other), expected)
        off(ops.inner(other, op), expected)


@every
@shapes
def test_eigenvalues_and_eigenvectors(make, size, seed):
    op = make(Source(seed), *size)
    C = matrix(op)
    λ, Q = ops.eigh(op)
    off(λ.sort().values, torch.linalg.eigvalsh(C).clamp_min(0))
    off(ops.eigenvalues(op).sort().values, λ.sort().values)
    vectors = ops.to_dense(Q)
    off(vectors.T @ vectors, torch.eye(len(C), dtype=F64))
    off(vectors @ torch.diag(λ) @ vectors.T, C)
    close(ops.to_dense(ops.transpose(Q)), vectors.T)
    off(ops.to_dense(ops.diagonalised(op)), C)


@every_regular
@pytest.mark.parametrize("exponent", [-2, -1, -0.5, 0, 0.3, 1, 2])
@shapes
def test_powers_are_those_of_the_matrix(make, exponent, size, seed):
    op = make(Source(seed), *size)
    λ, Q = torch.linalg.eigh(matrix(op))
    expected = Q @ torch.diag(λ**exponent) @ Q.T
    found = ops.power(op, exponent)
    close(ops.to_dense(found), expected, rtol=1e-8, atol=1e-8)
    again = ops.power(found, 0.5)
    close(ops.to_dense(ops.power(again, 2)), expected, rtol=1e-7, atol=1e-7)


@every_regular
@shapes
def test_the_inverse_times_the_operator_is_the_identity(make, size, seed):
    s = Source(seed)
    op = make(s, *size)
    x = s.rand(3, *op.shape)
    off(ops.product(op, ops.solve(op, x)), x)
    off(ops.solve(op, ops.product(op, x)), x)
    inverse = ops.power(op, -1)
    off(ops.to_dense(inverse) @ matrix(op), torch.eye(op.numel, dtype=F64))
    off(matrix(inverse), ops.to_dense(inverse))
    off(ops.diagonal(inverse).flatten(), ops.to_dense(inverse).diagonal())


@every_regular
@shapes
def test_determinant_and_condition_are_those_of_the_matrix(make, size, seed):
    op = make(Source(seed), *size)
    λ = torch.linalg.eigvalsh(matrix(op))
    off(ops.logdet(op), λ.log().sum())
    close(ops.det(op), λ.prod(), rtol=1e-8, atol=0)
    close(ops.condition(op), λ.max() / λ.min(), rtol=1e-8, atol=0)


@every
@shapes
def test_summaries_are_those_of_the_eigenvalues(make, size, seed):
    op = make(Source(seed), *size)
    C = matrix(op)
    λ = torch.linalg.eigvalsh(C)
    found = ops.summary(op)
    assert found.numel == len(C)
    assert found.rank == torch.linalg.matrix_rank(C, hermitian=True)
    off(found.largest, λ.max().clamp_min(0).item())
    off(found.smallest, λ.min().clamp_min(0).item())
    off(found.trace, C.trace().item())
    off(found.squares, C.square().sum().item())
    if found.rank == len(C):
        close(found.condition, (λ.max() / λ.min()).item(), rtol=1e-6, atol=0)
    else:
        assert found.condition == float("inf")
    if found.rank:
        close(found.effective_rank, (C.trace() ** 2 / C.square().sum()).item())


def test_products_of_small_factors_are_not_singular():
    """In float32 the eigenvalues of the product would vanish, and those of its inverse overflow."""
    A = 1e-30 * torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    found = ops.summary(ops.Kronecker(A, A))
    assert found.rank == 4
    close(found.condition, 9.0, rtol=1e-5, atol=0)
    close(found.effective_rank, (16 / 10) ** 2, rtol=1e-5, atol=0)


def test_a_sum_of_squares_is_zero_where_rounding_squared_is():
    Q = torch.eye(2, dtype=F64).unsqueeze(0)
    for small, rank in ((1e-20, 4), (1e-31, 3), (0.0, 3)):
        λ = torch.tensor([[[1.0, 1.0], [1.0, small]]], dtype=F64)
        assert ops.summary(ops.Eigenbasis(Q, Q, rounded_squares(λ))).rank == rank


@every_regular
@shapes
def test_roots(make, size, seed):
    s = Source(seed)
    op = make(s, *size)
    C = matrix(op)
    L = ops.to_dense(ops.cholesky(op))
    off(L, torch.linalg.cholesky(C))
    half = ops.to_dense(ops.power(op, 0.5))
    off(half @ half, C)
    F = ops.inverse_root(op)
    off(ops.to_dense(F) @ ops.to_dense(F).T @ C, torch.eye(len(C), dtype=F64))
    off(matrix(ops.transpose(F)), ops.to_dense(F).T)
    x = s.rand(2, *op.shape)
    off(flat(ops.product(ops.transpose(F), x), op), flat(x, op) @ ops.to_dense(F))


@every_regular
def test_samples_are_the_root_of_the_inverse_times_noise(make):
    s = Source(0)
    op = make(s, 2, 2, 2)
    draws = ops.sample(op, 5, torch.Generator().manual_seed(3))
    noise = torch.randn(5, *op.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draws, ops.product(ops.inverse_root(op), noise))


def test_samples_have_the_inverse_as_covariance():
    op = REGULAR[0](Source(0), 1, 2, 2)
    draws = ops.sample(op, 200_000, torch.Generator().manual_seed(0)).flatten(1)
    expected = torch.linalg.inv(matrix(op))
    assert ((draws.T @ draws / len(draws) - expected).norm() / expected.norm()) < 0.02


def test_samples_leave_the_global_state_alone():
    before = torch.get_rng_state()
    ops.sample(REGULAR[0](Source(0), 1, 2, 2), 3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@every
@shapes
def test_sums_and_multiples(make, size, seed):
    s = Source(seed)
    one, other = make(s, *size), make(s, *size)
    third = ops.Diagonal(s.positive(*one.shape))
    close(matrix(ops.scaled(one, 2.5)), 2.5 * matrix(one))
    close(matrix(ops.scaled(one, 0.0)), 0 * matrix(one))
    close(matrix(ops.add(one, other)), matrix(one) + matrix(other))
    whole = ops.add(one, third, other)
    close(matrix(whole), matrix(one) + matrix(third) + matrix(other))
    close(ops.to_dense(whole), matrix(whole))
    assert ops.add(one) is one


@every
@pytest.mark.parametrize("damp", ["block", "mean", "floor"])
@shapes
def test_damping_by_eigenvalues(make, damp, size, seed):
    s = Source(seed)
    op = make(s, *size)
    if damp == "mean" and isinstance(op, ops.BlockDiagonal):
        return  # block by block, below
    C = matrix(op)
    λ, Q = torch.linalg.eigh(C)
    λ = λ.clamp_min(0)
    mean = {"block": 1.0, "mean": λ.mean(), "floor": None}[damp]
    shifted = λ.clamp_min(0.3) if mean is None else λ + 0.3 * mean
    found = ops.damped(op, Damping(0.3, damp))
    off(ops.to_dense(found), Q @ torch.diag(shifted) @ Q.T)
    off(ops.to_dense(ops.damped(op, Damping(0.0, damp))), C)
    if shifted.min() > 0:
        x = s.rand(2, *op.shape)
        off(ops.product(found, ops.solve(found, x)), x)


def test_the_mean_is_every_blocks_own():
    s = Source(0)
    blocks = [make(s, 2, 3, 2) for make in (REGULAR[0], REGULAR[13], REGULAR[16])]
    found = ops.damped(ops.BlockDiagonal(tuple(blocks)), Damping(0.3, "mean"))
    expected = [ops.damped(block, Damping(0.3, "mean")) for block in blocks]
    off(ops.to_dense(found), torch.block_diag(*map(matrix, expected)))


@every
@pytest.mark.parametrize("damp", ["factors", "pi"])
@shapes
def test_damped_factors_are_regular(make, damp, size, seed):
    s = Source(seed)
    op = make(s, *size)
    found = ops.damped(op, Damping(0.3, damp))
    x = s.rand(2, *op.shape)
    off(ops.product(found, ops.solve(found, x)), x)
    if not isinstance(op, ops.Kronecker):
        return
    for k in range(op.shape[0]):
        A, B = op.A[k % len(op.A)], op.B[k % len(op.B)]
        A = torch.diag(A) if A.ndim == 1 else A
        π = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt() if damp == "pi" else 1
        π = π if π > 0 else 1
        A = A + π * 0.3**0.5 * torch.eye(len(A), dtype=F64)
        B = B + 0.3**0.5 / π * torch.eye(len(B), dtype=F64)
        n = len(A) * len(B)
        close(ops.to_dense(found)[k * n : (k + 1) * n, k * n : (k + 1) * n], torch.kron(A, B))


def test_where_nothing_lies_damped_factors_leave_the_damping():
    s = Source(0)
    inside = ops.Kronecker(s.regular(1, 3), s.regular(1, 2))
    entries = torch.tensor([0, 1, 2, 0, 3, 3]).view(1, 3, 2)
    found = ops.to_dense(ops.damped(ops.Placed(inside, entries, (6,)), Damping(0.3, "factors")))
    whole = matrix(ops.damped(inside, Damping(0.3, "factors")))
    P = torch.nn.functional.one_hot(entries.flatten(), 6).to(F64)
    expected = P.T @ whole @ P + 0.3 * torch.diag(torch.tensor([0, 0, 0, 0, 1, 1]).to(F64))
    close(found, expected)


def test_a_diagonal_factor_is_never_written_out():
    """The matrix of a vocabulary this large would hold 10¹² numbers."""
    counts = torch.arange(10**6, dtype=torch.float32).unsqueeze(0)
    op = ops.Kronecker(counts, torch.eye(2).unsqueeze(0))
    x = torch.ones(1, 10**6, 2)
    for damp in ops.DAMP:
        ops.solve(ops.damped(op, Damping(1.0, damp)), x)
    two = ops.damped(ops.KroneckerSum(op, op), Damping(1.0, "factors"))
    close(ops.product(two, ops.solve(two, x)), x)
    assert ops.logdet(op) == -torch.inf
    assert ops.condition(op) == torch.inf
    ops.product(ops.power(op, 0.5), x)


@every_singular
@shapes
def test_a_singular_operator(make, size, seed):
    op = make(Source(seed), *size)
    x = torch.ones(op.shape, dtype=F64)
    C = matrix(op)
    if not (torch.linalg.eigvalsh(C) <= 1e-12).any():
        return  # too small to be singular
    for function in (lambda: ops.solve(op, x), lambda: ops.power(op, -0.5)):
        with pytest.raises(OptionError, match=r"is singular(.|\n)*Pass a positive damping"):
            function()
    with pytest.raises(OptionError, match=r"no Cholesky factor(.|\n)*damping"):
        ops.cholesky(op)
    assert ops.logdet(op) == -torch.inf
    assert ops.det(op) == 0
    assert ops.condition(op) == ops.summary(op).condition == torch.inf
    half = ops.to_dense(ops.power(op, 0.5))
    close(half @ half, C, rtol=1e-7, atol=1e-7)
    off(ops.to_dense(ops.power(op, 0)), torch.eye(len(C), dtype=F64))


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
def test_a_sum_is_inverted_as_its_own_condition_allows(condition):
    """Each factor is nearly singular where its partner is not."""
    s = Source(0)
    λ, μ = torch.logspace(0, -np.log10(condition), 6, dtype=F64), torch.logspace(0, -1, 4).double()
    Q, P = s.basis(1, 6), s.basis(1, 4)
    A, B, flipped = (Q * λ) @ Q.mT, (P * μ) @ P.mT, (Q * λ.flip(0)) @ Q.mT
    op = ops.KroneckerSum(ops.Kronecker(A, B), ops.Kronecker(flipped, 2 * B))
    C, x = matrix(op), s.rand(*op.shape)
    allowed = 100 * torch.finfo(F64).eps * torch.linalg.cond(C).item()
    assert allowed < 1e-6
    right = torch.linalg.solve(C, x.flatten())
    assert (ops.solve(op, x).flatten() - right).norm() < allowed * right.norm()
    off(ops.logdet(op), torch.logdet(C))


def small_and_large():
    """Factors whose squares, or the products of whose eigenvalues, float32 has no room for."""
    s = Source(0, torch.float32)
    A, B = s.regular(1, 3), s.regular(1, 2)
    return [
        ops.Kronecker(a * A, b * B)
        for a, b in ((1e-12, 1e-24), (1e-25, 1e-25), (1e20, 1e-20), (1e25, 1e-25), (1e25, 1e20))
    ]


@pytest.mark.parametrize("op", small_and_large())
def test_small_and_large_factors(op):
    double = ops.to_dtype(op, F64)
    blocks = ops.BlockDiagonal((op, op))
    for function in (ops.norm, ops.logdet, ops.condition):
        for of, exact in ((op, double), (blocks, ops.to_dtype(blocks, F64))):
            expected = function(exact).float()
            if expected.isfinite() and not (function is ops.condition and of is blocks):
                close(function(of), expected, rtol=1e-4, atol=0)
    close(
        ops.power(op, 0.25).eigenvalues.double(),
        ops.power(double, 0.25).eigenvalues,
        rtol=1e-5,
        atol=0,
    )


def test_powers_that_the_dtype_has_no_room_for_are_refused():
    op = small_and_large()[1]
    with pytest.raises(OptionError, match=r"larger than torch.float32 holds(.|\n)*float64"):
        ops.power(op, -1)
    assert ops.power(ops.to_dtype(op, F64), -1).eigenvalues.isfinite().all()


@pytest.mark.parametrize("relative", [1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("damp", ["block", "factors", "pi"])
def test_damping_is_there_however_small_beside_the_largest_eigenvalue(damp, relative):
    """Factors of rank two: all other eigenvalues are what was added, also to sums."""
    s = Source(0, torch.float32)
    low = [x @ x.mT for x in (s.rand(1, 6, 2), s.rand(1, 4, 2), s.rand(1, 6, 2), s.rand(1, 4, 2))]
    one, other = ops.Kronecker(*low[:2]), ops.Kronecker(*low[2:])
    repeated = ops.Placed(one, torch.arange(24).view(1, 6, 4) // 2, (12,))
    for op in (one, ops.add(one, other), repeated):
        found = ops.damped(op, Damping(relative, damp))
        smallest = ops.eigenvalues(found).min()
        if damp == "block" or op is one:
            expected = ops.eigenvalues(ops.damped(ops.to_dtype(op, F64), Damping(relative, damp)))
            close(smallest.double(), expected.min(), rtol=1e-2, atol=0)
        assert smallest > 0.99 * relative  # of sums of factors only so much is known
        assert ops.logdet(found).isfinite()
        assert ops.condition(found).isfinite()
        assert ops.solve(found, torch.ones(found.shape)).isfinite().all()


@pytest.mark.parametrize("damp", ["factors", "pi"])
def test_what_is_damped_twice_has_both(damp):
    s = Source(0, torch.float32)
    op = ops.Kronecker(1e7 * s.rank_one(1, 2), s.regular(1, 3))
    first, second = Damping(1e-2, damp), Damping(1e-12, damp)
    for both in (op, ops.add(op, op)):
        once = ops.damped(both, first)
        twice = ops.damped(once, second)
        close(ops.eigenvalues(twice).min(), ops.eigenvalues(once).min(), rtol=1e-2, atol=0)


def test_damping_hides_no_negative_eigenvalue():
    op = ops.Kronecker(
        torch.eye(2).unsqueeze(0), torch.diag(torch.tensor([-0.5, 3.0])).unsqueeze(0)
    )
    for damp in ("factors", "pi"):
        with pytest.raises(
            OptionError, match=r"eigenvalue is -0.5 beside \S+; expected a positive"
        ):
            ops.eigenvalues(ops.damped(op, Damping(1.0, damp)))


@pytest.mark.parametrize(("a", "b", "p"), [(2e-4, 200, 2), (300, 0.01, 2), (1e-5, 1e3, -1)])
def test_powers_have_room_where_those_of_the_factors_have_none(a, b, p):
    one = torch.ones(1, 1, 1, dtype=torch.float16)
    found = ops.power(ops.Kronecker(a * one, b * one), p).eigenvalues
    close(found.double().squeeze(), torch.tensor((a * b) ** p, dtype=F64), rtol=1e-2, atol=0)


def test_norms_of_half_precision_and_of_infinity():
    assert ops.norm(ops.Diagonal(torch.ones(100_000, dtype=torch.float16))).item() == 316.25
    assert ops.norm(ops.Diagonal(torch.tensor([1.0, torch.inf]))) == torch.inf


EMPTY = [(1, 0, 2), (1, 2, 0), (0, 2, 2), (1, 0, 0), (0, 0, 0)]


@every
@pytest.mark.parametrize("size", EMPTY)
def test_empty_operators(make, size):
    s = Source(0)
    op = make(s, *size)
    C, x = matrix(op), s.rand(2, *op.shape)
    close(flat(ops.product(op, x), op), flat(x, op) @ C)
    close(ops.to_dense(op), C)
    close(ops.norm(op), torch.linalg.matrix_norm(C) if C.numel() else C.sum())
    regular = ops.damped(op, Damping(0.3))
    off(ops.product(regular, ops.solve(regular, x)), x)
    off(ops.logdet(regular), torch.linalg.slogdet(matrix(regular)).logabsdet)
    assert ops.sample(regular, 2, s.generator).shape == x.shape
    assert len(ops.eigenvalues(op)) == op.numel
    for damp in ops.DAMP:
        ops.to_dense(ops.damped(op, Damping(0.3, damp)))
    if not op.numel:
        with pytest.raises(OptionError, match="no rows"):
            ops.condition(op)


@every_regular
def test_the_dtype_is_kept(make):
    s = Source(0, torch.float32)
    op = make(s, 2, 3, 2)
    x = s.rand(2, *op.shape)
    found = [
        op,
        ops.power(op, -1),
        ops.power(op, 0.5),
        ops.cholesky(op),
        ops.inverse_root(op),
        ops.diagonalised(op),
        ops.scaled(op, 2),
        ops.add(op, op),
        *(ops.damped(op, Damping(0.1, damp)) for damp in ops.DAMP),
    ]
    for each in found:
        assert each.dtype == torch.float32
        assert ops.product(each, x).dtype == torch.float32
        assert ops.to_dense(each).dtype == torch.float32
    numbers = [ops.trace(op), ops.logdet(op), ops.norm(op), ops.condition(op), ops.eigenvalues(op)]
    assert all(n.dtype == torch.float32 for n in numbers)
    double = ops.to_dtype(op, F64)
    assert double.dtype == F64
    close(ops.to_dense(double).float(), ops.to_dense(op))
    assert ops.to_dtype(double, torch.float32).dtype == torch.float32
    assert (double.device, ops.solve(double, x.double()).device) == (op.device, x.device)


def test_float64_saves_what_float32_ruins():
    Q = Source(0).basis(1, 6)
    A = Q @ torch.diag(torch.logspace(0, -6, 6, dtype=F64)) @ Q.mT
    op, x = ops.Kronecker(A.float(), A.float()), torch.ones(1, 6, 6)
    double = ops.to_dtype(op, F64)
    expected = torch.linalg.solve(matrix(double) + 1e-9 * torch.eye(36), x.flatten().double())

    def error(found):
        return ((found.flatten().double() - expected).norm() / expected.norm()).item()

    damping = Damping(1e-9)
    there = ops.to_dtype(ops.power(ops.damped(double, damping), -1), torch.float32)
    assert error(ops.product(there, x)) < 1e-4
    assert error(ops.solve(ops.damped(op, damping), x)) > 1e-2


@pytest.mark.parametrize("below", [1e-7, 1e-2])
def test_what_float32_has_summed_is_semi_definite_in_float64(below):
    """A singular factor has an eigenvalue of zero, which comes out on either side of it."""
    B = torch.diag(torch.tensor([1, -below], dtype=F64))
    op = ops.Kronecker(torch.eye(2, dtype=F64).unsqueeze(0), B.unsqueeze(0))
    if below > 1e-3:
        with pytest.raises(OptionError, match="positive semi-definite"):
            ops.eigenvalues(op)
    else:
        close(ops.eigenvalues(op).flatten().sort().values, torch.tensor([0, 0, 1, 1], dtype=F64))


def test_small_eigenvalues_of_large_factors_count():
    """Only what is rounding in float32 is zero, however large a factor is."""
    Q = Source(0).basis(1, 256)
    A = (Q @ torch.diag(torch.logspace(0, -4, 256, dtype=F64)) @ Q.mT).float()
    op = ops.Kronecker(A, torch.eye(2)[None])
    close(ops.eigenvalues(op).min(), torch.tensor(1e-4), rtol=1e-2, atol=0)
    x = torch.ones(op.shape)
    close(ops.product(op, ops.solve(op, x)), x, rtol=1e-2, atol=1e-2)
    one = torch.ones(1, 512, 512)  # with an eigenvalue of 512
    damped = ops.damped(ops.Kronecker(one, one[:, :2, :2]), Damping(1e-2, "factors"))
    close(ops.eigenvalues(damped).min(), torch.tensor(1e-2), rtol=2e-2, atol=0)


def test_half_precision_is_taken_apart_in_float32():
    op = ops.to_dtype(REGULAR[0](Source(0), 1, 3, 2), torch.bfloat16)
    x = torch.ones(1, 3, 2, dtype=torch.bfloat16)
    assert ops.product(ops.power(op, -1), x).dtype == torch.bfloat16
    assert ops.eigenvalues(op).dtype == torch.bfloat16


@every_regular
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_cholesky_factors_and_sums_are_inverted(make, dtype):
    op = ops.to_dtype(make(Source(0), 2, 3, 2), dtype)
    double = ops.to_dtype(op, F64)
    found = (ops.to_dense(ops.cholesky(op)), ops.to_dense(ops.power(op, -1)), ops.logdet(op))
    assert {t.dtype for t in found} == {dtype}
    L, inverse, logdet = (t.double() for t in found)
    expected = [matrix(double), torch.linalg.inv(matrix(double)), ops.logdet(double)]
    for t, right in zip((L @ L.T, inverse, logdet), expected, strict=True):
        assert (t - right).norm() < 20 * torch.finfo(dtype).eps * right.norm().clamp_min(1)
    assert ops.sample(op, 2, torch.Generator().manual_seed(0)).dtype == dtype


@every
def test_scipys_operator_is_the_matrix(make):
    sparse = pytest.importorskip("scipy.sparse.linalg")
    op = make(Source(0), 2, 3, 2)
    C = matrix(op).numpy()
    found = ops.to_scipy(op)
    assert (found.shape, found.dtype) == (C.shape, np.dtype("float64"))
    np.testing.assert_allclose(found @ np.eye(len(C)), C, atol=1e-12)
    np.testing.assert_allclose(found.T @ np.eye(len(C)), C, atol=1e-12)
    np.testing.assert_allclose(found @ np.ones(len(C)), C @ np.ones(len(C)), atol=1e-12)
    if make in REGULAR:
        b = np.arange(len(C)) + 1.0
        solution, failed = sparse.cg(found, b, rtol=1e-12, maxiter=1000)
        assert not failed
        np.testing.assert_allclose(C @ solution, b, atol=1e-6)


def test_scipys_operator_of_a_root_knows_its_transpose():
    root = ops.cholesky(REGULAR[0](Source(0), 2, 3, 2))
    found, L = ops.to_scipy(root), ops.to_dense(root).numpy()
    np.testing.assert_allclose(found @ np.eye(len(L)), L, atol=1e-12)
    np.testing.assert_allclose(found.T @ np.eye(len(L)), L.T, atol=1e-12)


@every
def test_scipys_operator_of_factors_without_rows(make):
    pytest.importorskip("scipy")
    op = make(Source(0), 1, 0, 0)
    for shape in ((op.numel,), (op.numel, 3)):
        assert (ops.to_scipy(op) @ np.zeros(shape)).shape == shape


def test_scipys_operator_is_of_values_in_a_dtype_that_numpy_has():
    pytest.importorskip("scipy")
    K = REGULAR[0](Source(0), 1, 3, 2)
    asking = ops.Kronecker(K.A.clone().requires_grad_(), K.B)
    np.testing.assert_array_equal(ops.to_scipy(asking) @ np.ones(6), ops.to_scipy(K) @ np.ones(6))
    with pytest.raises(OptionError, match=r"expected .* to_dtype\(operator, torch.float32"):
        ops.to_scipy(ops.to_dtype(K, torch.bfloat16))


@pytest.mark.parametrize("within", ["itself", "a block", "a place", "a sum"])
def test_a_factor_is_not_symmetric_and_has_no_eigenvalues_here(within):
    """`torch.linalg.eigh` would take its lower triangle for both, without a word."""
    root = ops.cholesky(REGULAR[0](Source(0), 1, 3, 2))
    line = torch.arange(root.numel).view(root.shape)
    op = {
        "itself": root,
        "a block": ops.BlockDiagonal((root, root)),
        "a place": ops.Placed(root, line, (root.numel,)),
        "a sum": ops.add(root, REGULAR[0](Source(1), 1, 3, 2)),
    }[within]
    x = torch.ones(op.shape, dtype=F64)
    close(matrix(ops.transpose(op)), matrix(op).T)
    close(ops.to_dense(ops.transpose(op)), matrix(op).T)
    for function in (
        lambda: ops.solve(op, x),
        lambda: ops.power(op, 0.5),
        lambda: ops.logdet(op),
        lambda: ops.eigenvalues(op),
        lambda: ops.cholesky(op),
        lambda: ops.sample(op, 2, torch.Generator()),
    ):
        with pytest.raises(OptionError, match=r"not symmetric(.|\n)*expected(.|\n)*Take"):
            function()


def test_what_is_no_operator_is_named():
    K = REGULAR[0](Source(0), 1, 3, 2)
    for call in (
        lambda: ops.to_dense(torch.eye(6)),
        lambda: ops.logdet(torch.eye(6)),
        lambda: ops.add(K, 3.0),
        lambda: ops.add(K, torch.eye(6)),
    ):
        with pytest.raises(ParameterError, match=r"of type (Tensor|float); expected .* Dense"):
            call()


def test_without_scipy_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(FxkfacError, match="pip install scipy"):
        ops.to_scipy(REGULAR[0](Source(0), 1, 2, 2))


@every
def test_a_product_compiles_in_one_graph(make):
    s = Source(0)
    op = make(s, 2, 3, 2)
    x = s.rand(2, *op.shape)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: ops.product(op, v), fullgraph=True, backend="aot_eager")
    close(compiled(x), ops.product(op, x))


class TestRefusals:
    def test_arrays_of_another_shape_or_dtype(self):
        op = REGULAR[0](Source(0), 1, 3, 2)
        with pytest.raises(ParameterError, match=r"\(3, 2\)(.|\n)*expected \(..., 1, 3, 2\)"):
            ops.product(op, torch.ones(3, 2, dtype=F64))
        with pytest.raises(ParameterError, match=r"float32(.|\n)*float64"):
            ops.solve(op, torch.ones(1, 3, 2))

    @pytest.mark.parametrize(
        ("A", "B"),
        [((3, 2), (2, 2)), ((1, 3, 2), (1, 2, 2)), ((3,), (1, 2, 2)), ((2, 3, 3), (4, 2, 2))],
    )
    def test_factors_that_are_none(self, A, B):
        with pytest.raises(ParameterError, match="expected"):
            ops.Kronecker(torch.ones(A), torch.ones(B))

    def test_factors_of_two_dtypes(self):
        with pytest.raises(ParameterError, match=r"float32(.|\n)*float64(.|\n)*one dtype"):
            ops.Kronecker(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=F64))

    def test_bases_that_do_not_fit(self):
        for kind in (ops.Eigenbasis, ops.Congruence, ops.Factor):
            with pytest.raises(ParameterError, match=r"\(1, 2, 2\)(.|\n)*expected"):
                kind(torch.ones(1, 2, 2), None, torch.ones(1, 3, 2))

    def test_other_parts_that_do_not_fit(self):
        one, two = ops.Diagonal(torch.ones(2)), ops.Diagonal(torch.ones(3))
        with pytest.raises(ParameterError, match="numel, numel"):
            ops.Dense(torch.ones(2, 3))
        with pytest.raises(ParameterError, match="one shape for all"):
            ops.add(one, two)
        with pytest.raises(ParameterError, match="expected one shape"):
            ops.inner(one, two)
        with pytest.raises(ParameterError, match="at least one block"):
            ops.BlockDiagonal(())
        with pytest.raises(ParameterError, match="that of the operator"):
            ops.Placed(one, torch.arange(3), (5,))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_factors_that_are_not_finite(self, bad):
        A = torch.full((1, 2, 2), bad)
        for op in (
            ops.Kronecker(A, torch.eye(2)[None]),
            ops.Kronecker(A[0], torch.eye(2).expand(2, 2, 2)),
            ops.Dense(A[0]),
            ops.Diagonal(A),
            ops.Eigenbasis(None, None, A),
        ):
            for function in (
                ops.eigh,
                ops.eigenvalues,
                ops.logdet,
                ops.cholesky,
                lambda op: ops.power(op, -1),
                lambda op: ops.damped(op, Damping(1.0)),
            ):
                with pytest.raises(NonFiniteError, match="NaN or Inf"):
                    function(op)
        whole = ops.Kronecker(torch.eye(2)[None], torch.eye(2)[None])
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            ops.power(ops.KroneckerSum(whole, ops.Kronecker(A, A)), -1)

    def test_negative_eigenvalues(self):
        minus = -torch.eye(2)
        for op in (
            ops.Dense(minus),
            ops.Diagonal(minus),
            ops.Kronecker(minus[None], -minus[None]),
            ops.Eigenbasis(None, None, minus[None]),
        ):
            with pytest.raises(OptionError, match=r"eigenvalue is -1(.|\n)*expected"):
                ops.power(op, 0.5)

    @pytest.mark.parametrize("damp", ops.DAMP)
    def test_damping_below_zero(self, damp):
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(OptionError, match=f"damping={value}"):
                Damping(value, damp)

    def test_damping_of_what(self):
        with pytest.raises(OptionError, match="damp='both'; expected one of 'block'"):
            Damping(1.0, "both")
        with pytest.raises(OptionError, match="damping=0"):
            Damping(0.0, "factors")

    def test_negative_multiples(self):
        with pytest.raises(OptionError, match="factor=-1"):
            ops.scaled(REGULAR[0](Source(0), 1, 2, 2), -1)

    def test_a_block_is_named(self):
        blocks = (ops.Diagonal(torch.ones(2)), ops.Diagonal(torch.zeros(2)))
        with pytest.raises(OptionError, match=r"block of V: the operator is singular"):
            ops.power(ops.BlockDiagonal(blocks, ("W", "V")), -1)
        with pytest.raises(OptionError, match=r"^the operator is singular"):
            ops.power(ops.BlockDiagonal(blocks), -1)

    def test_a_sum_that_is_too_large_to_be_written_out(self):
        large = ops.Kronecker(torch.ones(1, 2**14), torch.eye(2)[None])
        op = ops.Sum((large, large, large))
        x = torch.ones(op.shape)
        close(ops.product(op, x), 3 * x)
        close(ops.trace(op), torch.tensor(3.0 * 2**15))
        close(ops.norm(op), torch.tensor(3 * 2**7.5))
        named = ops.BlockDiagonal((op,), ("W",))
        for function in (ops.eigh, ops.logdet, ops.cholesky, lambda o: ops.power(o, -1)):
            with pytest.raises(OptionError, match=r"block of W: Sum(.|\n)*1,073,741,824 numbers"):
                function(named)
