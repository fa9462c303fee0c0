"""Laws of the two flattening orders and of Kronecker products, over drawn shapes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.linalg import cvec, kronecker_dense, rvec
from fxkfac.linalg.operators import Damping, Kronecker, damped, solve

SIZES = st.integers(1, 4)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def positive(group: int, d: int, rank: int) -> torch.Tensor:
    factor = rand(group, d, rank)
    return factor @ factor.mT


@given(st.lists(SIZES, min_size=1, max_size=4))
def test_rvec_and_cvec_are_numpys_orders(shape: list[int]) -> None:
    t = rand(*shape)
    assert np.array_equal(rvec(t), t.numpy().flatten(order="C"))
    assert np.array_equal(cvec(t), t.numpy().flatten(order="F"))


@given(st.lists(SIZES, min_size=2, max_size=4), st.data())
def test_partial_flattening_is_that_of_every_slice(shape: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(shape) - 1))
    end = data.draw(st.integers(start, len(shape) - 1))
    t = rand(*shape)
    for flatten in (rvec, cvec):
        flat = flatten(t, start, end)
        assert flat.shape == (*shape[:start], np.prod(shape[start : end + 1]), *shape[end + 1 :])
        before, after = (0,) * start, (-1,) * (len(shape) - 1 - end)
        assert torch.equal(flat[(*before, slice(None), *after)], flatten(t[(*before, ..., *after)]))


@pytest.mark.parametrize("flatten", [rvec, cvec])
@pytest.mark.parametrize("axes", [(5, 6), (0, 4), (-5, 1), (2, 1), (-1, 0)], ids=str)
def test_axes_that_there_are_not_or_in_another_order_are_refused(
    flatten: Callable[..., Tensor], axes: tuple[int, int]
) -> None:
    with pytest.raises(OptionError, match=rf"start_dim={axes[0]} .*\(2, 3, 4, 5\); expected"):
        flatten(rand(2, 3, 4, 5), *axes)


@given(SIZES, SIZES, SIZES)
def test_dense_acts_on_the_rvec_of_in_by_out(group: int, d_in: int, d_out: int) -> None:
    A, B, X = positive(group, d_in, 5), positive(group, d_out, 5), rand(group, d_in, d_out)
    dense = kronecker_dense(A, B)
    for g in range(group):
        torch.testing.assert_close(dense[g], torch.kron(A[g], B[g]))
        torch.testing.assert_close(dense[g] @ rvec(X[g]), rvec(A[g] @ X[g] @ B[g]))


def kronecker_solve(A: Tensor, B: Tensor, G: Tensor, damping: float) -> Tensor:
    """X with (A ⊗ B + damping · I) vec X = vec G."""
    return solve(damped(Kronecker(A, B), Damping(damping)), G)


@given(SIZES, SIZES, SIZES, st.integers(0, 4), st.floats(1e-3, 10))
def test_solve_is_the_damped_inverse_of_singular_factors_too(
    group: int, d_in: int, d_out: int, rank: int, damping: float
) -> None:
    A, B, G = positive(group, d_in, rank), positive(group, d_out, 5), rand(group, d_in, d_out)
    X = kronecker_solve(A, B, G, damping)
    torch.testing.assert_close(A @ X @ B + damping * X, G, rtol=1e-8, atol=1e-8)


def test_a_singular_product_needs_damping() -> None:
    A, B, G = positive(1, 3, 2), positive(1, 2, 5), rand(1, 3, 2)
    with pytest.raises(OptionError, match="singular"):
        kronecker_solve(A, B, G, damping=0.0)
    with pytest.raises(OptionError, match="expected zero or a positive number"):
        kronecker_solve(A, B, G, damping=-1.0)
    regular = positive(1, 3, 5)
    torch.testing.assert_close(regular @ kronecker_solve(regular, B, G, 0.0) @ B, G)
