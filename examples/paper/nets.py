"""Sections 2.5, 2.5.1 and 2.5.2: Hessian and GGN of a net's risk, block by block, and the roots of
loss Hessians. Examples 11 and 12, Snippet 17.

Names choose the block: a list of names is the matrix of them all, a tuple of two the mixed block.
"""

from __future__ import annotations

import torch
from setting import classes, mlp, rand, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact

NET, X, Y = mlp(4, 3, 3), rand(6, 4), classes(6)
LOSS = nn.CrossEntropyLoss()
R = 1 / 6
NAMES = [name for name, _ in NET.named_parameters()]


def hessian_by_blocks() -> None:
    """R Σ_n of the data's Hessians; all blocks together are the whole. Section 2.5.1."""
    whole = exact.hessian(NET, LOSS, (X, Y))
    rows = [[exact.hessian(NET, LOSS, (X, Y), (a, b)) for b in NAMES] for a in NAMES]
    same(whole, torch.cat([torch.cat(row, 1) for row in rows]))
    each = [exact.hessian(NET, LOSS, (X[n : n + 1], Y[n : n + 1])) for n in range(6)]
    same(whole, R * torch.stack(each).sum(0))
    least = torch.linalg.eigvalsh(whole)[0]
    assert least < 0
    print(f"  {len(NAMES)}×{len(NAMES)} blocks, least eigenvalue {least:.4f}")


def ggn_by_blocks() -> None:
    """R Σ_n Jᵀ (H_f c) J, whose blocks are those of the whole. Section 2.5.2."""
    for vec in ("rvec", "cvec"):
        whole = exact.ggn(NET, LOSS, (X, Y), vec=vec)
        rows = [[exact.ggn(NET, LOSS, (X, Y), (a, b), vec=vec) for b in NAMES] for a in NAMES]
        same(whole, torch.cat([torch.cat(row, 1) for row in rows]))
        least = torch.linalg.eigvalsh(whole)[0]
        assert least > -1e-12
        print(f"  {vec}: {tuple(whole.shape)}, least eigenvalue {least:.1e}")


def ggn_of_the_linearized_net() -> None:
    """The Hessian of the risk of the net that is linear in its parameters. Section 2.5.2."""
    params = {name: p.detach() for name, p in NET.named_parameters()}
    linear = exact.linearize(lambda p: torch.func.functional_call(NET, p, (X,)), params)
    H = torch.func.hessian(lambda p: LOSS(linear(p), Y))(params)
    sizes = {name: p.numel() for name, p in params.items()}
    blocks = [[H[a][b].reshape(sizes[a], sizes[b]) for b in NAMES] for a in NAMES]
    same(exact.ggn(NET, LOSS, (X, Y)), torch.cat([torch.cat(row, 1) for row in blocks]))
    print(f"  {sum(sizes.values())} parameters, linearised at their values")


def block_diagonal() -> None:
    """KFAC keeps the blocks of layers along the diagonal, and zeros elsewhere. Section 2.5."""
    factors = fxkfac.kfac(fxkfac.trace(NET, X), LOSS, (X, Y))
    found = factors.dense(*NAMES)
    layer = torch.tensor([0] * 15 + [1] * 12)
    inside = layer[:, None] == layer
    assert (found[~inside] == 0).all()
    whole = exact.ggn(NET, LOSS, (X, Y))
    assert (whole[~inside] != 0).any()
    print(f"  {int(inside.sum())} of {inside.numel()} entries are in blocks")


def root_of_square_loss() -> None:
    """S = I, also for tensors of targets. Example 11, Snippet 17."""
    f, y = rand(1, 2, 3, 4), rand(1, 2, 3, 4, seed=1)
    S = _root(nn.MSELoss(), f, y)
    same(S, torch.eye(24).double())
    print(f"  S is the identity of {len(S)} predictions")


def root_of_cross_entropy() -> None:
    """S = diag √σ − σ √σᵀ at every position, whatever the label. Example 12, Snippet 17."""
    f, y = rand(1, 5, 2, 3), classes(1, 2, 3, count=5)
    S, σ = _root(nn.CrossEntropyLoss(), f, y), f.softmax(1)
    criterion = fxkfac.likelihood_of(nn.CrossEntropyLoss()).criterion
    same(S @ S.T, exact.hessian_matrix(lambda f: criterion(f, y), f))
    same(S, _root(nn.CrossEntropyLoss(), f, (y + 1) % 5))
    first, at = σ[0, :, 0, 0], S.reshape(5, 2, 3, 5, 2, 3)[:, 0, 0, :, 0, 0]
    same(at, first.sqrt().diag() - first.outer(first.sqrt()))
    print(f"  S Sᵀ is the Hessian of {f.numel()} logits at {y.numel()} positions")


def ggn_as_an_outer_product() -> None:
    """R Σ_n V_n V_nᵀ with V_n = J_nᵀ S_n, one column for each class. Section 2.5.2."""
    W = NET[0].weight.detach()
    J = exact.jacobian(lambda W: torch.func.functional_call(NET, {"0.weight": W}, (X,)), W)
    V = torch.stack(
        [
            J_n.T @ _root(LOSS, f, y)
            for J_n, f, y in zip(J.split(3), NET(X).detach().split(1), Y.split(1), strict=True)
        ]
    )
    same(exact.ggn(NET, LOSS, (X, Y), "0.weight"), R * (V @ V.mT).sum(0))
    print(f"  V_n has shape {tuple(V.shape[1:])} for each of {len(V)} data")


def _root(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """S of one datum, column by column."""
    likelihood = fxkfac.likelihood_of(loss)
    columns = torch.eye(f.numel()).double().reshape(-1, *f.shape)
    return torch.stack([likelihood.hessian_sqrt(f, y, e).flatten() for e in columns], 1)


if __name__ == "__main__":
    run(globals())
