"""Section 2.4.1: two orders in which a tensor becomes a vector. Definitions 1 and 2, Snippet 4.

`rvec`, last axis fastest, is how PyTorch stores; `cvec`, first axis fastest, is how papers write.
"""

from __future__ import annotations

from itertools import product

import torch
from setting import rand, run

from fxkfac.exact import cvec, rvec


def of_a_matrix() -> None:
    """Rows one after another, or columns. Example 5."""
    A = torch.tensor([[1, 2], [3, 4]])
    assert rvec(A).tolist() == [1, 2, 3, 4]
    assert cvec(A).tolist() == [1, 3, 2, 4]
    print(f"  rvec {rvec(A).tolist()}, cvec {cvec(A).tolist()}")


def of_a_tensor() -> None:
    """Which entry of a tensor comes where. Setup 1, Definitions 1 and 2, Snippet 4."""
    A = rand(2, 3, 4)
    for i, j, k in product(range(2), range(3), range(4)):
        assert rvec(A)[(i * 3 + j) * 4 + k] == A[i, j, k]
        assert cvec(A)[i + 2 * (j + 3 * k)] == A[i, j, k]
    print(f"  {A.numel()} entries of a tensor {tuple(A.shape)} are in their places")


def of_some_axes() -> None:
    """A range of axes becomes one: first all row axes, then all column axes. Snippet 4."""
    A = rand(2, 3, 4, 5)
    for vec in (rvec, cvec):
        M = vec(vec(A, end_dim=1), start_dim=1)
        assert M.shape == (6, 20)
        assert torch.equal(M[:, 0], vec(A[:, :, 0, 0]))
        assert torch.equal(M[0], vec(A[0, 0]))
        print(f"  {vec.__name__}: {tuple(A.shape)} -> {tuple(M.shape)}")


def one_order_read_in_the_other() -> None:
    """What was flattened in one order must not be read in the other. Caveat 2."""
    A = rand(2, 3)
    assert torch.equal(cvec(A), rvec(A.T))
    assert not torch.equal(cvec(A).reshape(2, 3), A)
    assert torch.equal(cvec(A).reshape(3, 2).T, A)
    print("  reshape undoes rvec; reshape and transpose undo cvec")


if __name__ == "__main__":
    run(globals())
