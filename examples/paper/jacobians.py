"""Section 2.4.2: Jacobians and their products. Definitions 3 to 8, Snippets 5 to 7, Figure 1.

`exact.jacobian` is the matrix of any function, in either order; the general Jacobian is its rvec
one, reshaped. Products are those of a model f(params, x) with its parameters.
"""

from __future__ import annotations

import torch
from setting import rand, rounded, run, same
from torch import Tensor

from fxkfac import exact
from fxkfac.exact import cvec, rvec

X = rand(5, 2)


def _f(W: Tensor) -> Tensor:
    """A function from tensors (2, 3) to tensors (5, 3)."""
    return (X @ W).sin() * W.sum(0)


def of_a_vector() -> None:
    """Partial derivatives of vector by vector. Setup 2, Definition 3."""
    a = rand(2)
    J = exact.jacobian(lambda a: torch.stack([a[0] * a[1], a[0].sin(), a[1] ** 2]), a)
    same(J, torch.stack([a[1], a[0], a[0].cos(), a[0] * 0, a[0] * 0, 2 * a[1]]).reshape(3, 2))
    print(f"  {rounded(J)}")


def of_a_tensor() -> None:
    """The general Jacobian has the output's axes and then the input's. Setup 3, Definition 4."""
    W = rand(2, 3)
    J = exact.jacobian(_f, W).reshape(5, 3, 2, 3)
    same(J, torch.func.jacrev(_f)(W))
    print(f"  shape {tuple(J.shape)}")


def products() -> None:
    """VJP and JVP contract the output's or the input's axes. Definitions 5 and 6, Snippet 5."""
    W, U, V = rand(2, 3), rand(5, 3, seed=1), rand(2, 3, seed=2)
    J = exact.jacobian(_f, W).reshape(5, 3, 2, 3)

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["W"]).sin() * params["W"].sum(0)

    pulled = exact.vector_jacobian_product(model, X, U, "W", params={"W": W})["W"]
    pushed = exact.jacobian_vector_product(model, X, {"W": V}, params={"W": W})
    same(pulled, torch.einsum("no, noij -> ij", U, J))
    same(pushed, torch.einsum("noij, ij -> no", J, V))
    same((pulled * V).sum(), (U * pushed).sum())
    print(f"  ⟨Jᵀu, v⟩ = ⟨u, Jv⟩ = {(U * pushed).sum():.6f}")


def flattened_before_or_after() -> None:
    """Flattened before or after: the same. Definitions 7, 8, Snippet 6, Figure 1."""
    W = rand(2, 3)
    tensor = torch.func.jacrev(_f)(W)
    unflatten = {"rvec": lambda v: v.reshape(2, 3), "cvec": lambda v: v.reshape(3, 2).T}
    for name, vec in {"rvec": rvec, "cvec": cvec}.items():
        J = exact.jacobian(_f, W, name)
        same(J, vec(vec(tensor, end_dim=1), start_dim=1))
        flat = torch.func.jacrev(lambda v, vec=vec, name=name: vec(_f(unflatten[name](v))))
        same(J, flat(vec(W)))
        print(f"  {name}: {tuple(J.shape)}, first row {rounded(J[0])}")


def of_a_linear_layer() -> None:
    """x̃ᵀ ⊗ I in cvec and I ⊗ x̃ᵀ in rvec: the K of KFAC. Example 6, Snippet 7."""
    W1, x, identity = rand(2, 4), rand(3), torch.eye(2).double()
    x1 = torch.cat([x, x.new_ones(1)]).unsqueeze(0)  # x̃ᵀ

    def layer(W1: Tensor) -> Tensor:
        return W1[:, :-1] @ x + W1[:, -1]  # W x + b, with W̃ = (W b)

    same(exact.jacobian(layer, W1, "cvec"), torch.kron(x1, identity))
    same(exact.jacobian(layer, W1, "rvec"), torch.kron(identity, x1))
    print(f"  x̃ = {rounded(x1[0])} is in every row of either")


if __name__ == "__main__":
    run(globals())
