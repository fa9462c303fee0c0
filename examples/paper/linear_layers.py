"""Sections 5 and 5.1: KFAC of a linear layer.

Setup 8, Definitions 22 and 23, Example 16, Snippet 24.

A = R Σ_n x_n x_nᵀ        B = (1/N) Σ_n Σ_c g_{n,c} g_{n,c}ᵀ
"""

from __future__ import annotations

import torch
from setting import backpropagated, classes, error, mlp, rand, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac.exact import cvec, rvec

N = 6
LOSS = nn.CrossEntropyLoss()


def weight_and_bias_are_one() -> None:
    """z = W̃ x̃ with W̃ = (W b), x̃ = (x 1): one block by default, two on request. Setup 8."""
    net, x, y = mlp(4, 3), rand(N, 4), classes(N)
    W1 = torch.cat([net[0].weight, net[0].bias[:, None]], 1)
    same(nn.functional.pad(x, (0, 1), value=1.0) @ W1.T, net(x))
    program = fxkfac.trace(net, x)
    joint = fxkfac.kfac(program, LOSS, (x, y))
    apart = fxkfac.kfac(program, LOSS, (x, y), separate_weight_and_bias=True)
    assert list(joint) == ["0.weight"]
    assert list(apart) == ["0.weight", "0.bias"]
    same(joint["0.weight"].A[:4, :4], apart["0.weight"].A)
    print(f"  A is {tuple(joint['0.weight'].A.shape)}, or {tuple(apart['0.weight'].A.shape)}")


def expectation_approximation() -> None:
    """Each side is summed alone: exact if x or g does not vary. Definition 22, Equation 3."""
    x, g = rand(N, 3), rand(N, 2, seed=1)
    X, G = x.T @ x, g.T @ g
    same(torch.kron(X, G / N), N * torch.kron(X / N, G / N))
    off = error(torch.kron(X, G / N), _sum_of_products(x, g))
    assert off > 0.1
    print(f"  relative error {off:.3f}, and none where one side does not vary")
    for a, b in ((x[:1].expand(N, 3), g), (x, g[:1].expand(N, 2))):
        same(torch.kron(a.T @ a, b.T @ b / N), _sum_of_products(a, b))


def why_the_mean() -> None:
    """Of all I ⊗ B the nearest to cvec(G) cvec(G)ᵀ has B = G Gᵀ / N. Example 16."""
    X, G, R = rand(3, N), rand(2, N, seed=1), 0.5
    target = cvec(G).outer(cvec(G))
    identity = torch.eye(N).double()

    def residual(B: Tensor) -> Tensor:
        return (target - torch.kron(identity, B)).square().sum()

    B = G @ G.T / N
    same(exact.jacobian(residual, B), torch.zeros(1, 4).double())
    same(exact.hessian_matrix(residual, B), 2 * N * torch.eye(4).double())  # a minimum
    wide = torch.kron(X, torch.eye(2).double())
    same(R * wide @ torch.kron(identity, B) @ wide.T, torch.kron(R * X @ X.T, B))
    print(f"  ‖residual‖² = {residual(B):.4f}; {residual(torch.zeros_like(B)):.4f} with B = 0")


def factors() -> None:
    """rvec: B ⊗ A, cvec: A ⊗ B. Definition 23, Equation 4, Snippet 24."""
    net, x, y = mlp(4, 3), rand(N, 4), classes(N)
    factors = fxkfac.kfac(fxkfac.trace(net, x), LOSS, (x, y), separate_weight_and_bias=True)
    A, B = factors["0.weight"].A, factors["0.weight"].B
    g = torch.stack(backpropagated("type-2", LOSS, net(x).detach(), y))  # no layer above this one
    same(A, x.T @ x / N)  # R = 1/N
    same(B, torch.einsum("cni, cnj -> ij", g, g) / N)
    same(factors.dense("0.weight"), torch.kron(B, A))
    V = rand(3, 4, seed=2)
    same(torch.kron(B, A) @ rvec(V), rvec(B @ V @ A))
    same(torch.kron(A, B) @ cvec(V), cvec(B @ V @ A))
    print(f"  A {tuple(A.shape)}, B {tuple(B.shape)}, block {tuple(torch.kron(A, B).shape)}")


def shared_axes() -> None:
    """Further axes are rows of their own: they count in B's mean, too. Snippet 24."""
    net, x, y = mlp(4, 3), rand(N, 5, 4), rand(N, 5, 3, seed=1)
    factors = fxkfac.kfac(fxkfac.trace(net, x), nn.MSELoss(), (x, y))
    x1 = nn.functional.pad(x, (0, 1), value=1.0).reshape(N * 5, 5)
    same(factors["0.weight"].A, 2 / (N * 5 * 3) * x1.T @ x1)
    same(factors["0.weight"].B, torch.eye(3).double())  # one vector for each row and output
    print(f"  {N * 5} rows of {N} data")


def _sum_of_products(x: Tensor, g: Tensor) -> Tensor:
    """Σ_n x xᵀ ⊗ g gᵀ."""
    pairs = zip(x, g, strict=True)
    return torch.stack([torch.kron(a.outer(a), b.outer(b)) for a, b in pairs]).sum(0)


if __name__ == "__main__":
    run(globals())
