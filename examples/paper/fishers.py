"""Sections 2.5.3 to 2.5.5: the Fisher in its forms, and how it is the GGN.

Definitions 20 and 21, Examples 13 and 14, Snippets 18 to 21. The paper's Fishers have 1/N in the
place of R; so does the mean cross-entropy of one label for each datum, which is used here.
"""

from __future__ import annotations

import torch
from setting import classes, error, mean_square, mlp, numbers, rand, rounded, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac.exact import rvec

NET, X, Y = mlp(4, 3, 3), rand(6, 4), classes(6)
LOSS = nn.CrossEntropyLoss()
R = 1 / 6
NAME = "0.weight"
W = NET[0].weight.detach()
LOSSES = {nn.MSELoss: rand(6, 3, seed=1), nn.CrossEntropyLoss: Y}


def metric_of_the_kl_divergence() -> None:
    """F is the second derivative of KL(θ ‖ θ + Δ) at Δ = 0; the first is zero. Section 2.5.3."""
    log_p = _predict(W).log_softmax(1)

    def divergence(W: Tensor) -> Tensor:
        return R * (log_p.exp() * (log_p - _predict(W).log_softmax(1))).sum()

    F = exact.type1_fisher(NET, LOSS, (X, Y), NAME)
    same(exact.hessian_matrix(divergence, W), F)
    same(exact.jacobian(divergence, W)[0], torch.zeros(W.numel()).double())
    Δ = 1e-2 * rand(3, 4, seed=3)
    half = rvec(Δ) @ F @ rvec(Δ) / 2
    print(f"  KL {divergence(W + Δ):.4e}, ½ Δᵀ F Δ {half:.4e}")


def type_2() -> None:
    """The mean over labels of loss Hessians, which are all the same: the GGN. Section 2.5.3."""
    f = _predict(W)
    likelihood = fxkfac.likelihood_of(LOSS)
    J = exact.jacobian(_predict, W)
    mean = torch.zeros(f.numel(), f.numel()).double()
    for probability, label in likelihood.labels(f):
        H = exact.hessian_matrix(lambda f, y=label: likelihood.criterion(f, y), f)
        mean += probability.expand_as(f).flatten() * H  # H has no entries between data
    same(R * J.T @ mean @ J, exact.ggn(NET, LOSS, (X, Y), NAME))
    print(f"  {f.shape[1]} labels, {len(f)} data")


def hessian_over_own_labels() -> None:
    """With σ itself as soft labels, held fixed, the Hessian is the Fisher. Section 2.5.3."""
    σ = _predict(W).softmax(1)
    F = exact.type1_fisher(NET, LOSS, (X, Y), NAME)
    same(exact.hessian(NET, LOSS, (X, σ), NAME), F)
    off = error(exact.hessian(NET, LOSS, (X, Y), NAME), F)
    assert off > 0.1
    print(f"  with the data's labels the relative difference is {off:.3f}")


def type_1() -> None:
    """The mean over labels of outer products of gradients, exactly. Section 2.5.3."""
    F = torch.zeros(W.numel(), W.numel()).double()
    for n in range(6):
        for label, p in enumerate(_predict(W)[n].softmax(0)):
            g = _gradient(n, torch.tensor([label]))
            F += R * p * g.outer(g)
    same(exact.type1_fisher(NET, LOSS, (X, Y), NAME), F)
    print(f"  trace {F.trace():.6f}")


def monte_carlo() -> None:
    """With M labels for each datum the error falls as 1/√M. Definition 20, Snippet 18, Figure 7."""
    F = exact.type1_fisher(NET, LOSS, (X, Y), NAME)

    def off(M: int, seed: int) -> float:
        drawn = {"mc_samples": M, "generator": numbers(seed)}
        return error(exact.mc_fisher(NET, LOSS, (X, Y), NAME, **drawn), F)

    few, many = (mean_square([off(M, seed) for seed in range(5)]) for M in (10, 1_000))
    assert 5 < few / many < 20
    print(f"  relative error {few:.4f} for M = 10, {many:.4f} for M = 1000")


def monte_carlo_products() -> None:
    """The product draws the labels of the matrix. Snippet 19."""
    v = rand(3, 4, seed=2)
    drawn = {"mc_samples": 5, "generator": numbers(0)}
    Fv = exact.fisher_vector_product(NET, LOSS, (X, Y), {NAME: v}, fisher="mc", **drawn)[NAME]
    drawn = {"mc_samples": 5, "generator": numbers(0)}
    same(rvec(Fv), exact.mc_fisher(NET, LOSS, (X, Y), NAME, **drawn) @ rvec(v))
    print(f"  ‖F v‖ = {Fv.norm():.6f}")


def gradients_of_losses() -> None:
    """f − y, and σ − onehot(y): no autodiff is needed. Examples 13 and 14."""
    f, (square, y) = _predict(W), LOSSES.values()
    found = fxkfac.likelihood_of(nn.MSELoss()).gradient(f, square)
    same(found, f - square)
    found = fxkfac.likelihood_of(LOSS).gradient(f, y)
    same(found, f.softmax(1) - nn.functional.one_hot(y, 3))
    print(f"  of the first datum {rounded(found[0])}")


def would_be_gradients() -> None:
    """R Σ_n Ṽ_n Ṽ_nᵀ, where S̃_n has would-be gradients over √M for columns. Section 2.5.3."""
    likelihood, f, M, generator = fxkfac.likelihood_of(LOSS), _predict(W), 4, numbers(0)
    drawn = [likelihood.sample(f, generator) for _ in range(M)]
    S = torch.stack([likelihood.gradient(f, y) for y in drawn], 2) / M**0.5  # batch class sample
    J = exact.jacobian(_predict, W).reshape(6, 3, -1)
    V = J.mT @ S
    same(
        R * (V @ V.mT).sum(0),
        exact.mc_fisher(NET, LOSS, (X, Y), NAME, mc_samples=M, generator=numbers(0)),
    )
    print(f"  S̃_n {tuple(S.shape[1:])}, Ṽ_n {tuple(V.shape[1:])}")


def fisher_and_ggn() -> None:
    """Type-1, type-2 and GGN are one for both losses, in both orders. Section 2.5.4, Figure 8."""
    for kind, y in LOSSES.items():
        for vec in ("rvec", "cvec"):
            G = exact.ggn(NET, kind(), (X, y), vec=vec)
            same(exact.type1_fisher(NET, kind(), (X, y), vec=vec), G)
        print(f"  {kind.__name__}: {tuple(G.shape)}, trace {G.trace():.6f}")


def empirical() -> None:
    """Outer products of the data's own gradients. Definition 21, Snippet 20."""
    gradients = torch.stack([_gradient(n, Y[n : n + 1]) for n in range(6)])
    E = exact.empirical_fisher(NET, LOSS, (X, Y), NAME)
    same(E, R * gradients.T @ gradients)
    off = error(E, exact.type1_fisher(NET, LOSS, (X, Y), NAME))
    assert off > 0.1
    print(f"  it is no Fisher: relative difference {off:.3f}")


def empirical_products() -> None:
    """The same for one vector, without the matrix. Snippet 21."""
    v = rand(3, 4, seed=2)
    Ev = exact.fisher_vector_product(NET, LOSS, (X, Y), {NAME: v}, fisher="empirical")[NAME]
    same(rvec(Ev), exact.empirical_fisher(NET, LOSS, (X, Y), NAME) @ rvec(v))
    print(f"  ‖E v‖ = {Ev.norm():.6f}")


def _predict(W: Tensor) -> Tensor:
    return torch.func.functional_call(NET, {**_rest(), NAME: W}, (X,))


def _rest() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in NET.named_parameters()}


def _gradient(n: int, label: Tensor) -> Tensor:
    """The gradient of datum n for some label, flat."""
    c = LOSS(NET(X[n : n + 1]), label)
    return torch.autograd.grad(c, NET[0].weight)[0].flatten()


if __name__ == "__main__":
    run(globals())
