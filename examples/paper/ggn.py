"""Section 2.4.4: partial linearisation and the generalised Gauss-Newton matrix.

Definitions 14 to 19, Examples 9 and 10, Snippets 12 to 16, Figure 3. For f = g ∘ h the GGN is the
Hessian of g ∘ h̄ at the anchor, with h̄ = `exact.linearize(h, anchor)`; for a model and a loss it
is `exact.ggn`.
"""

from __future__ import annotations

import torch
from setting import mlp, rand, run, same
from torch import Tensor, nn

from fxkfac import exact
from fxkfac.exact import cvec, rvec


def linearization() -> None:
    """h̄ is affine, and like h to first order. Definitions 14 and 15, Snippet 12."""
    anchor, step = rand(2, 3, 4), rand(2, 3, 4, seed=1)
    linear = exact.linearize(torch.cos, anchor)
    same(linear(anchor), anchor.cos())
    same(exact.jacobian(linear, anchor), exact.jacobian(torch.cos, anchor))
    same(linear(anchor + 2 * step) - linear(anchor), 2 * (linear(anchor + step) - linear(anchor)))
    off = [(linear(anchor + ε * step) - (anchor + ε * step).cos()).norm() for ε in (1e-2, 1e-3)]
    assert 90 < off[0] / off[1] < 110  # the remainder is of second order
    print(f"  remainder {off[0]:.2e} at ε = 0.01, {off[1]:.2e} at 0.001")


def in_one_dimension() -> None:
    """f'' = h' g'' h' + h'' g', and linearising drops the second term. Section 2.4.4."""
    x = rand(1)
    h, g = torch.sin, lambda z: z.exp().sum()
    G = exact.hessian_matrix(lambda t: g(exact.linearize(h, x)(t)), x)
    H = exact.hessian_matrix(lambda t: g(h(t)), x)
    same(G[0], x.cos() * x.sin().exp() * x.cos())
    same(H[0], G[0] - x.sin() * x.sin().exp())
    print(f"  Hessian {H.item():.6f}, GGN {G.item():.6f}")


def rosenbrock() -> None:
    """Linearise first, or differentiate first. Setup 6, Definition 16, Example 9, Snippet 13."""
    α = 10.0
    x = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def h(x: Tensor) -> Tensor:
        return torch.stack([1 - x[0], α**0.5 * (x[1] - x[0] ** 2)])

    def g(h: Tensor) -> Tensor:
        return h @ h

    G = exact.hessian_matrix(lambda t: g(exact.linearize(h, x)(t)), x)
    J = exact.jacobian(h, x)
    same(G, J.T @ exact.hessian_matrix(g, h(x)) @ J)
    corner, side = 1 + 4 * α * x[0] ** 2, -2 * α * x[0]
    same(G, 2 * torch.stack([corner, side, side, x[0] * 0 + α]).reshape(2, 2))

    H = exact.hessian_matrix(lambda t: g(h(t)), x)
    same(H[0, 0] - G[0, 0], 4 * α * (x[0] ** 2 - x[1]))
    least = [torch.linalg.eigvalsh(M)[0].item() for M in (H, G)]
    assert least[0] < 0 < least[1]
    print(f"  least eigenvalue: Hessian {least[0]:.3f}, GGN {least[1]:.3f}")


def of_a_tensor() -> None:
    """Contracted from Jacobians and a Hessian. Setup 7, Definition 17, Snippet 14."""
    A, M = rand(2, 3), rand(4, 2)

    def h(A: Tensor) -> Tensor:
        return (M @ A).tanh()

    def g(B: Tensor) -> Tensor:
        return B.exp().sum().log()

    J = exact.jacobian(h, A).reshape(4, 3, 2, 3)
    H = exact.hessian_matrix(g, h(A)).reshape(4, 3, 4, 3)
    expected = torch.einsum("abij, abcd, cdkl -> ijkl", J, H, J)
    G = exact.hessian_matrix(lambda t: g(exact.linearize(h, A)(t)), A)
    same(G.reshape(2, 3, 2, 3), expected)
    print(f"  shape {tuple(expected.shape)}")


def products() -> None:
    """A JVP, a product with the loss Hessian, and a VJP. Definition 18, Snippet 15."""
    net, x, y, loss = mlp(4, 3, 3), rand(6, 4), rand(6, 3, seed=1), nn.MSELoss()
    vector = {"0.weight": rand(3, 4, seed=2)}
    Jv = exact.jacobian_vector_product(net, x, vector)
    H = exact.hessian_matrix(lambda f: loss(f, y), net(x).detach())
    HJv = (H @ rvec(Jv)).reshape(6, 3)
    expected = exact.vector_jacobian_product(net, x, HJv, "0.weight")["0.weight"]
    found = exact.ggn_vector_product(net, loss, (x, y), vector)["0.weight"]
    same(found, expected)
    same(rvec(found), exact.ggn(net, loss, (x, y), "0.weight") @ rvec(vector["0.weight"]))
    print(f"  ‖G v‖ = {found.norm():.6f}")


def flattened_in_both_orders() -> None:
    """(Jᵛᵉᶜ)ᵀ Hᵛᵉᶜ Jᵛᵉᶜ in either order. Definition 19, Snippet 14, Figure 3."""
    net, x, y, loss = mlp(4, 3, 3), rand(6, 4), rand(6, 3, seed=1), nn.MSELoss()
    W = net[0].weight.detach()

    def predict(W: Tensor) -> Tensor:
        return torch.func.functional_call(net, {"0.weight": W}, (x,))

    tensor = exact.ggn(net, loss, (x, y), "0.weight").reshape(3, 4, 3, 4)
    for vec, flatten in {"rvec": rvec, "cvec": cvec}.items():
        J = exact.jacobian(predict, W, vec)
        H = exact.hessian_matrix(lambda f: loss(f, y), predict(W).detach(), vec)
        G = exact.ggn(net, loss, (x, y), "0.weight", vec=vec)
        same(G, J.T @ H @ J)
        same(G, flatten(flatten(tensor, end_dim=1), start_dim=1))
        linear = exact.linearize(predict, W)
        same(G, exact.hessian_matrix(lambda W, at=linear: loss(at(W), y), W, vec))
        print(f"  {vec}: {tuple(G.shape)}, trace {G.trace():.6f}")


def of_linear_regression() -> None:
    """(Σ x xᵀ) ⊗ I in cvec, I ⊗ (Σ x xᵀ) in rvec, times R = 2. Example 10, Snippet 16."""
    net, x, y = nn.Linear(5, 3, False).double(), rand(10, 5), rand(10, 3, seed=1)
    loss, A, identity = nn.MSELoss(reduction="sum"), 2 * x.T @ x, torch.eye(3).double()
    same(exact.ggn(net, loss, (x, y), "weight", vec="cvec"), torch.kron(A, identity))
    same(exact.ggn(net, loss, (x, y), "weight", vec="rvec"), torch.kron(identity, A))
    print("  both orders are one Kronecker product, in opposite order")


if __name__ == "__main__":
    run(globals())
