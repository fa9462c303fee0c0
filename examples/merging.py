"""Merging: two nets that know five digits each become one that knows ten, without training it.

A common start is trained a little on 200 of scikit-learn's digits, and then on the digits 0 to 4
by themselves and 5 to 9 by themselves (1,000 in all), which gives two nets, θ₁ and θ₂, each of
which forgets what the other one learns. Where the loss of each net is its quadratic model with
curvature C, the minimum of their sum is the average weighted by curvature (Matena & Raffel 2022,
with the diagonal of the Fisher):

    θ = (C₁ + C₂)⁻¹ (C₁ θ₁ + C₂ θ₂)

With KFAC both are a Kronecker product for each weight with its bias. Damped, C_i = (A_i + √λ I) ⊗
(B_i + √λ I), and the sum of two is inverted exactly, without being written out. As the damping is
part of C_i on both sides, equal nets are merged to themselves, and a large λ gives the plain
average. The exact diagonals of the same matrices take the same four lines.

The loss of each half is a mean, and so is its curvature. It prints:

    net                     test loss  accuracy  of 0 to 4  of 5 to 9
    common start                1.299     0.543      0.625      0.464
    trained on 0 to 4           2.591     0.479      0.976      0.000
    trained on 5 to 9           2.333     0.514      0.034      0.977
    plain average               0.826     0.747      0.829      0.668
    diagonals, λ = 1e-06        0.680     0.802      0.659      0.941
    diagonals, λ = 1e-05        0.679     0.804      0.662      0.941
    diagonals, λ = 0.0001       0.673     0.807      0.669      0.941
    diagonals, λ = 0.001        0.654     0.834      0.730      0.934
    diagonals, λ = 0.01         0.717     0.829      0.799      0.859
    KFAC, λ = 1e-06             0.402     0.876      0.860      0.891
    KFAC, λ = 1e-05             0.366     0.888      0.870      0.905
    KFAC, λ = 0.0001            0.343     0.901      0.877      0.924
    KFAC, λ = 0.001             0.345     0.920      0.918      0.921
    KFAC, λ = 0.01              0.377     0.920      0.932      0.908
    trained on both             0.183     0.955      0.949      0.961

Each λ shown of KFAC does better than each of the diagonals, these better than the plain average,
and that better than each of the two nets. None comes up to training on both halves at once.

Run it with `python examples/merging.py`.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxkfac
from fxkfac import operators as ops

SEED = 0
START, TRAINING = 200, 1000  # digits of 1,797 for the start and for the two halves; others test
WIDTH, EPOCHS = 16, 20
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
LOSS = nn.CrossEntropyLoss()

Data = tuple[Tensor, Tensor]  # images of shape (N, 64) in [0, 1], labels of shape (N,)
Params = dict[str, Tensor]


def digits() -> tuple[Data, Data, Data]:
    """Data for the start, for the two halves and for testing, split at random."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float64) / 16, torch.tensor(data.target)
    parts = torch.randperm(len(images)).tensor_split([START, START + TRAINING])
    start, train, test = ((images[rows], labels[rows]) for rows in parts)
    return start, train, test


def halves(data: Data) -> tuple[Data, Data]:
    """The digits 0 to 4, and 5 to 9."""
    images, labels = data
    low = labels < 5
    return (images[low], labels[low]), (images[~low], labels[~low])


def net(params: Params, images: Tensor) -> Tensor:
    h = torch.tanh(nn.functional.linear(images, params["W1"], params["b1"]))
    h = torch.tanh(nn.functional.linear(h, params["W2"], params["b2"]))
    return nn.functional.linear(h, params["W3"], params["b3"])


def initial(width: int) -> Params:
    params, widths = {}, (64, width, width, 10)
    for k in range(1, len(widths)):
        layer = nn.Linear(widths[k - 1], widths[k], dtype=torch.float64)
        params |= {f"W{k}": layer.weight.detach(), f"b{k}": layer.bias.detach()}
    return params


def trained(params: Params, data: Data, epochs: int) -> Params:
    """The parameters after some epochs of Adam that begins at the given ones."""
    params = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(64):
            optimizer.zero_grad()
            LOSS(net(params, data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in params.items()}


def curvature(params: Params, data: Data, structure: str = "kronecker") -> fxkfac.Factors:
    """The curvature of a net at its own parameters, on its own half."""
    program = fxkfac.trace(net, data[0][:8], params, structure={"*": structure})
    return fxkfac.kfac(program, LOSS, data, params)


def average(nets: list[Params]) -> Params:
    return {name: torch.stack([params[name] for params in nets]).mean(0) for name in nets[0]}


def merged(nets: list[Params], curvatures: list[fxkfac.Factors], damping: float) -> Params:
    """(C₁ + C₂)⁻¹ (C₁ θ₁ + C₂ θ₂), with the damping in C₁ and C₂."""
    damped = [ops.damped(C.operator(), ops.Damping(damping, "factors")) for C in curvatures]
    products = [ops.product(C, θ) for C, θ in zip(damped, nets, strict=True)]
    weighted = {name: sum(p[name] for p in products) for name in nets[0]}
    return ops.solve(ops.add(*damped), weighted)


def evaluated(params: Params, data: Data) -> tuple[float, float, float, float]:
    """Loss, and accuracy on all digits, on 0 to 4 and on 5 to 9."""
    logits = net(params, data[0])
    right, low = (logits.argmax(1) == data[1]).double(), data[1] < 5
    parts = (right, right[low], right[~low])
    return LOSS(logits, data[1]).item(), *(part.mean().item() for part in parts)


def all_nets(common: Params, train: Data, epochs: int) -> dict[str, Params]:
    """Both nets, what they are merged to in all ways, and one trained on both halves."""
    parts = halves(train)
    nets = [trained(common, half, epochs) for half in parts]
    factors = [curvature(*pair) for pair in zip(nets, parts, strict=True)]
    diagonals = [curvature(*pair, "diagonal") for pair in zip(nets, parts, strict=True)]
    found = {"common start": common, "trained on 0 to 4": nets[0], "trained on 5 to 9": nets[1]}
    found["plain average"] = average(nets)
    for λ in DAMPINGS:
        found[f"diagonals, λ = {λ:g}"] = merged(nets, diagonals, λ)
    for λ in DAMPINGS:
        found[f"KFAC, λ = {λ:g}"] = merged(nets, factors, λ)
    return found | {"trained on both": trained(common, train, epochs)}


def report(found: dict[str, Params], test: Data) -> None:
    """Print what each net knows."""
    print(f"{'net':<24}{'test loss':>9}{'accuracy':>10}{'of 0 to 4':>11}{'of 5 to 9':>11}")
    for name, params in found.items():
        loss, all_ten, low, high = evaluated(params, test)
        print(f"{name:<24}{loss:>9.3f}{all_ten:>10.3f}{low:>11.3f}{high:>11.3f}")


def main() -> None:
    torch.manual_seed(SEED)
    start, train, test = digits()
    common = trained(initial(WIDTH), start, EPOCHS)
    report(all_nets(common, train, EPOCHS), test)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main()
