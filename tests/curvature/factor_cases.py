"""Factors with every kind of block, and their matrices put together by hand."""

from __future__ import annotations

import torch
from drawn import F64, classes, rand, seeded
from torch import nn

import fxkfac

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def of_module(make, x, y, loss=CE, **options):
    kinds = options.pop("structure", None)
    return fxkfac.kfac(fxkfac.trace(seeded(make), x, structure=kinds), loss, (x, y), **options)


def of_function(f, params, x, y, **options):
    return fxkfac.kfac(fxkfac.trace(f, x, params), MSE, (x, y), **options)


def mlp(**options):
    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    return of_module(make, rand(5, 4), classes(5), **options)


def apart():
    return mlp(separate_weight_and_bias=True)


def grouped():
    def make():
        conv = nn.Conv1d(4, 6, 2, groups=2)
        return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))

    return of_module(make, rand(5, 4, 3), classes(5))


def embedding():
    def make():
        return nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(6, 3))

    return of_module(make, classes(5, 3, C=4), classes(5))


def exact_blocks():
    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3))

    kinds = {"0.weight": "dense", "0.bias": "identity", "2.bias": "diagonal"}
    return of_module(make, rand(5, 4), classes(5), structure=kinds)


def tied():
    def f(params, x):
        return torch.tanh(x @ params["W"]) @ params["W"].T

    return of_function(f, {"W": rand(4, 3)}, rand(5, 4), rand(5, 4, seed=1))


def tied_embedding():
    def f(params, x):
        return torch.tanh(params["W"][x]).mean(1) @ params["W"].T

    return of_function(f, {"W": rand(4, 3)}, classes(5, 2, C=4), rand(5, 4, seed=1))


def three_slices():
    """Query, key and value of one parameter: three products that share no entry."""

    def f(params, x):
        q, k, v = params["W"].split(2, dim=1)
        return (x @ q).softmax(-1) * (x @ k).tanh() + x @ v

    return of_function(f, {"W": rand(4, 6)}, rand(5, 4), rand(5, 2, seed=1))


def overlapping_slices():
    def f(params, x):
        return (x @ params["W"][:, :3]).tanh() * (x @ params["W"][:, 1:])

    return of_function(f, {"W": rand(4, 4)}, rand(5, 4), rand(5, 3, seed=1))


def one_slice():
    """Entries that nothing uses."""

    def f(params, x):
        return x @ params["W"][:, 1:3]

    return of_function(f, {"W": rand(4, 5)}, rand(5, 4), rand(5, 2, seed=1))


def twice_in_one_product():
    """Every entry comes twice."""

    def f(params, x):
        return (x @ torch.cat([params["W"], params["W"]], 1)).tanh()

    return of_function(f, {"W": rand(4, 2)}, rand(5, 4), rand(5, 4, seed=1))


def three_losses():
    def f(params, x):
        return (x @ params["W"] + params["b"]).tanh()

    params = {"W": rand(3, 2), "b": rand(2)}
    parts = [of_function(f, params, rand(5, 3, seed=k), rand(5, 2)) for k in range(3)]
    return fxkfac.sum_of(*parts)


EVERY = [
    mlp,
    apart,
    grouped,
    embedding,
    exact_blocks,
    tied,
    tied_embedding,
    three_slices,
    overlapping_slices,
    one_slice,
    twice_in_one_product,
    three_losses,
]


def matrix(block):
    """A block by the definition of its terms."""
    if isinstance(block, fxkfac.Diagonal):
        return torch.diag(block.diagonal.flatten())
    if isinstance(block, fxkfac.Dense):
        return block.matrix
    total = torch.zeros(block.numel, block.numel, dtype=F64)
    for term in block.terms:
        for g, entries in enumerate(term.entries):
            A = term.A if term.A.ndim < 3 else term.A[g % len(term.A)]
            B = term.B if term.B.ndim < 3 else term.B[g]
            P = torch.eye(block.numel, dtype=F64)[entries.flatten()]
            total += P.T @ torch.kron(torch.diag(A) if A.ndim == 1 else A, B) @ P
    return total


def whole(factors):
    """The matrix of all blocks, and the parameters in its order."""
    names = [name for block in factors.values() for name in block.params]
    return torch.block_diag(*map(matrix, factors.values())), names
