"""Section 2.4.3: Hessians and their products. Definitions 9 to 13, Snippets 8 to 11, Figure 2.

`exact.hessian_matrix` is that of any scalar function, in either order; `exact.hessian` that of a
loss in a model's parameters, with mixed blocks of two of them.
"""

from __future__ import annotations

import torch
from setting import classes, mlp, rand, rounded, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac.exact import cvec, rvec


def _f(A: Tensor) -> Tensor:
    """A scalar function of tensors (2, 3)."""
    return (A.sin() @ A.T).logsumexp((0, 1))


def of_a_vector() -> None:
    """Second derivatives of scalar by vector, where both orders are one. Setup 4, Definition 9."""
    a, M = rand(3), rand(3, 3)
    H = exact.hessian_matrix(lambda a: a @ M @ a / 2 + a[0] ** 3, a)
    expected = (M + M.T) / 2
    expected[0, 0] += 6 * a[0]
    same(H, expected)
    same(exact.hessian_matrix(lambda a: a @ M @ a / 2 + a[0] ** 3, a, "cvec"), H)
    print(f"  diagonal {rounded(H.diagonal())}")


def of_a_tensor() -> None:
    """The general Hessian has the argument's axes twice. Setup 5, Definition 10, Snippet 9."""
    A = rand(2, 3)
    H = exact.hessian_matrix(_f, A).reshape(2, 3, 2, 3)
    same(H, torch.func.hessian(_f)(A))
    same(H, H.permute(2, 3, 0, 1))
    print(f"  shape {tuple(H.shape)}")


def products() -> None:
    """H v without H, also of the mixed block of two layers. Definition 11, Snippet 8."""
    net, data, loss = mlp(4, 3, 3), (rand(6, 4), classes(6)), nn.CrossEntropyLoss()
    V = rand(3, 3, seed=1)
    Hv = exact.hessian_vector_product(net, loss, data, {"2.weight": V})["2.weight"]
    same(rvec(Hv), exact.hessian(net, loss, data, "2.weight") @ rvec(V))

    vector = {"0.weight": torch.zeros(3, 4).double(), "2.weight": V}
    mixed = exact.hessian_vector_product(net, loss, data, vector)["0.weight"]
    same(rvec(mixed), exact.hessian(net, loss, data, ("0.weight", "2.weight")) @ rvec(V))
    print(f"  ‖H v‖ = {Hv.norm():.6f}, of the mixed block {mixed.norm():.6f}")


def flattened_before_or_after() -> None:
    """Flattened before or after: the same. Definitions 12, 13, Snippet 9, Figure 2."""
    A = rand(2, 3)
    tensor = torch.func.hessian(_f)(A)
    unflatten = {"rvec": lambda v: v.reshape(2, 3), "cvec": lambda v: v.reshape(3, 2).T}
    for name, vec in {"rvec": rvec, "cvec": cvec}.items():
        H = exact.hessian_matrix(_f, A, name)
        same(H, vec(vec(tensor, end_dim=1), start_dim=1))
        same(H, torch.func.hessian(lambda v, name=name: _f(unflatten[name](v)))(vec(A)))
        print(f"  {name}: first row {rounded(H[0])}")


def of_cross_entropy() -> None:
    """diag σ − σσᵀ, whatever the label. Example 7, Snippet 10."""
    f = rand(1, 3)
    σ = f[0].softmax(0)
    criterion = fxkfac.likelihood_of(nn.CrossEntropyLoss()).criterion
    for label in range(3):
        y = torch.tensor([label])
        for vec in ("rvec", "cvec"):
            H = exact.hessian_matrix(lambda f, y=y: criterion(f, y), f, vec)
            same(H, σ.diag() - σ.outer(σ))
    print(f"  eigenvalues {rounded(torch.linalg.eigvalsh(H))}")


def of_square_loss() -> None:
    """I for the criterion, and so 2 I for PyTorch's sum, as R = 2. Example 8, Snippet 11."""
    f, y, identity = rand(1, 3), rand(1, 3, seed=1), torch.eye(3).double()
    loss = nn.MSELoss(reduction="sum")
    criterion = fxkfac.likelihood_of(loss).criterion
    for vec in ("rvec", "cvec"):
        same(exact.hessian_matrix(lambda f: criterion(f, y), f, vec), identity)
        same(exact.hessian_matrix(lambda f: loss(f, y), f, vec), 2 * identity)
    print("  I, and 2 I")


if __name__ == "__main__":
    run(globals())
