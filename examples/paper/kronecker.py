"""Section 4.1: why Kronecker products. Equation 2, Example 15.

What the products make cheap, in `fxkfac.operators`; and how they come out of the Jacobian of a
linear layer, x̃ᵀ ⊗ I, seen on the tapped inputs x and gradients g of a net.
"""

from __future__ import annotations

import torch
from setting import backpropagated, classes, mlp, rand, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac import operators as ops
from fxkfac.exact import cvec, rvec
from fxkfac.graph.tap import Taps

NET, X, Y = mlp(4, 3, 3), rand(6, 4), classes(6)
LOSS = nn.CrossEntropyLoss()
R = 1 / 6


def products_with_vectors() -> None:
    """(A ⊗ B) v is cvec(B V Aᵀ), or rvec(A V Bᵀ) for the V of that order. Section 4.1.1."""
    A, B = rand(2, 3), rand(4, 5, seed=1)
    v = rand(15, seed=2)
    Kv = torch.kron(A, B) @ v
    same(Kv, cvec(B @ v.reshape(3, 5).T @ A.T))
    same(Kv, rvec(A @ v.reshape(3, 5) @ B.T))

    A, B = _definite(3), _definite(5)
    V = v.reshape(1, 3, 5)  # of one group
    same(rvec(ops.product(ops.Kronecker(A[None], B[None]), V)), torch.kron(A, B) @ v)
    print(f"  {A.numel() + B.numel()} numbers in the place of {(A.numel() * B.numel())}")


def transpose_inverse_and_product() -> None:
    """Each is that of the factors. Section 4.1.1."""
    A, B, C, D = rand(2, 3), rand(4, 5, seed=1), rand(3, 2, seed=2), rand(5, 3, seed=3)
    same(torch.kron(A, B).T, torch.kron(A.T, B.T))
    same(torch.kron(A, B) @ torch.kron(C, D), torch.kron(A @ C, B @ D))

    A, B = _definite(3), _definite(5)
    K = ops.Kronecker(A[None], B[None])
    inverse = ops.power(K, -1)
    same(ops.to_dense(inverse), torch.kron(torch.linalg.inv(A), torch.linalg.inv(B)))
    v = rand(1, 3, 5)
    same(ops.product(K, ops.solve(K, v)), v)
    print(f"  log det {ops.logdet(K):.6f} from factors of size 3 and 5")


def damped_inverse() -> None:
    """What is added to the diagonal only needs the factors' eigenvalues. Beyond Section 4.1.1."""
    A, B, δ = _definite(3), _definite(5), 0.1
    K = ops.damped(ops.Kronecker(A[None], B[None]), ops.Damping(δ))
    same(ops.to_dense(K), torch.kron(A, B) + δ * torch.eye(15).double())
    v = rand(1, 3, 5)
    same(rvec(ops.solve(K, v)), torch.linalg.solve(ops.to_dense(K), rvec(v)))
    print(f"  condition {ops.condition(K):.3f}")


def curvature_of_a_layer() -> None:
    """R Σ_n Jᵀ [•] J is a sum of Kronecker products. Equation 2, Section 4.1.2, Example 15."""
    x, gradients = _tapped(backpropagated("type-2", LOSS, NET(X).detach(), Y))
    C = torch.zeros(12, 12).double()
    for g in gradients:
        for x_n, g_n in zip(x, g, strict=True):
            C += R * torch.kron(x_n.outer(x_n), g_n.outer(g_n))
    same(exact.ggn(NET, LOSS, (X, Y), "0.weight", vec="cvec"), C)
    print(
        f"  {len(x)} data × {len(gradients)} vectors: a sum of {len(x) * len(gradients)} products"
    )


def pseudo_gradients() -> None:
    """With ▲ = ∇_f c, what arrives at a layer is its gradient of the criterion. Section 4.1.3."""
    x, (g,) = _tapped(backpropagated("empirical", LOSS, NET(X).detach(), Y))
    (expected,) = torch.autograd.grad(LOSS(NET(X), Y), NET[0].weight)
    same(R * g.T @ x, expected)
    print(f"  Σ g xᵀ R is the gradient of the weight, of norm {expected.norm():.6f}")


def _tapped(vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What enters the first layer, and what each vector brings to its output."""
    program, taps = fxkfac.trace(NET, X), Taps()
    f = program.run(X, sink=taps).prediction
    (k,) = [k for k, use in enumerate(program.uses) if use.parameter == "0.weight"]
    return taps.inputs[k], [taps.gradients(f, v)[program.uses[k].tap] for v in vectors]


def _definite(size: int) -> Tensor:
    M = rand(size, size, seed=size)
    return M @ M.T + torch.eye(size).double()


if __name__ == "__main__":
    run(globals())
