"""Sections 4.2 and 4.3: how KFAC is computed, and what is sent back. Snippets 22 and 23.

`fxkfac.kfac` is these five steps for any model; here they are by hand, from the same taps, for a
multi-layer perceptron.
"""

from __future__ import annotations

import torch
from setting import backpropagated, classes, error, mlp, numbers, rand, run, same
from torch import Tensor, nn

import fxkfac
from fxkfac import exact
from fxkfac.graph.tap import Taps

NET, X = mlp(4, 3, 3), rand(6, 4)
LOSSES = {nn.MSELoss(): rand(6, 3, seed=1), nn.CrossEntropyLoss(): classes(6)}


def five_steps() -> None:
    """Forward, A, vectors and B, R: the factors of `kfac`. Section 4.2, Snippet 22."""
    program = fxkfac.trace(NET, X)
    for loss, y in LOSSES.items():
        for fisher in ("type-2", "empirical", "forward-only"):
            factors = fxkfac.kfac(program, loss, (X, y), fisher=fisher)
            by_hand = _kfac(program, loss, X, y, fisher)
            assert by_hand.keys() == factors.keys()
            for name, (A, B) in by_hand.items():
                same(factors[name].A, A)
                same(factors[name].B, B)
            print(f"  {type(loss).__name__}, {fisher}: {len(by_hand)} layers")


def vectors_of_type_2() -> None:
    """Σ_c ▲ ▲ᵀ is the Hessian of the criterion, datum by datum. Section 4.3, Snippet 23."""
    f = NET(X).detach()
    for loss, y in LOSSES.items():
        vectors = backpropagated("type-2", loss, f, y)
        for n, outer in enumerate(_outer(vectors)):
            same(outer, _criterion_hessian(loss, f[n : n + 1], y[n : n + 1]))
        print(f"  {type(loss).__name__}: {len(vectors)} vectors for {f.shape[1]} outputs")


def vectors_of_monte_carlo() -> None:
    """Would-be gradients over √M, whose outer products come near H. Section 4.3, Snippet 23."""
    f = NET(X).detach()
    for loss, y in LOSSES.items():
        vectors = backpropagated("mc", loss, f, y, mc_samples=2_000)
        likelihood = fxkfac.likelihood_of(loss)
        drawn = likelihood.sample(f, numbers(0))
        same(vectors[0], likelihood.gradient(f, drawn) / 2_000**0.5)
        off = error(_outer(vectors), _outer(backpropagated("type-2", loss, f, y)))
        assert off < 0.1
        print(f"  {type(loss).__name__}: {len(vectors)} vectors, relative error {off:.4f}")


def vector_of_the_empirical_fisher() -> None:
    """One vector, that of the gradient itself. Section 4.3, Snippet 23."""
    f = NET(X).detach().requires_grad_()
    for loss, y in LOSSES.items():
        (vector,) = backpropagated("empirical", loss, f.detach(), y)
        likelihood = fxkfac.likelihood_of(loss)
        R = likelihood.reduction_factor(likelihood.count(f, y))
        same(R * vector, torch.autograd.grad(loss(f, y), f)[0])
        print(f"  {type(loss).__name__}: norm {vector.norm():.6f}")


def _kfac(
    program: fxkfac.Program, loss: nn.Module, x: Tensor, y: Tensor, fisher: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the layers of a multi-layer perceptron, weight and bias joined."""
    # 1. The forward pass leaves inputs and outputs of layers at the taps.
    taps = Taps()
    f = program.run(x, sink=taps).prediction
    layers = {use.parameter: (k, use.tap) for k, use in enumerate(program.uses) if not use.is_bias}

    # 2. A from the inputs, with a one for the bias.
    A = {}
    for name, (k, _) in layers.items():
        x1 = nn.functional.pad(taps.inputs[k], (0, 1), value=1.0)
        A[name] = x1.T @ x1

    # 3. B from what the vectors bring to the outputs; without vectors it is the identity.
    out = {name: taps.outputs[tap].shape[1] for name, (_, tap) in layers.items()}
    vectors = backpropagated(fisher, loss, f.detach(), y)
    B = {name: (0 if vectors else 1) * torch.eye(d).double() for name, d in out.items()}
    for vector in vectors:
        gradients = taps.gradients(f, vector)
        for name, (_, tap) in layers.items():
            g = gradients[tap]
            B[name] += g.T @ g / len(x)

    # 4. R goes into A. 5. One pair for each layer.
    likelihood = fxkfac.likelihood_of(loss)
    R = likelihood.reduction_factor(likelihood.count(f, y))
    return {name: (R * A[name], B[name]) for name in layers}


def _criterion_hessian(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    criterion = fxkfac.likelihood_of(loss).criterion
    return exact.hessian_matrix(lambda f: criterion(f, y), f)


def _outer(vectors: list[Tensor]) -> Tensor:
    """Σ_c ▲ ▲ᵀ of every datum."""
    V = torch.stack(vectors)
    return torch.einsum("cni, cnj -> nij", V, V)


if __name__ == "__main__":
    run(globals())
