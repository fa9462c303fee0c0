"""Pruning: half of the weights of a small net on digits removed, without any retraining.

A coordinate w of a weight that is set to zero raises the training loss by about ½ h w², with h the
curvature along it; that is its saliency. Three ways of choosing the smallest half:

- magnitude: the entries of W, with h = 1;
- exact diagonal: the entries of W, with h from the exact diagonal of the GGN (Optimal Brain Damage,
  LeCun et al. 1989), `structure={"*": "diagonal"}`;
- eigenbasis of KFAC: the entries of Q_Bᵀ W Q_A, with h = λ_B λ_A, where A = Q_A Λ_A Q_Aᵀ and
  B = Q_B Λ_B Q_Bᵀ (EigenDamage, Wang et al. 2019, which removes whole rows and columns of it; here
  single entries go, as they do in the other two).

Each ranks the coordinates of all layers together; biases stay. Some rows of what it prints, with
the picture, docs/pictures/pruning.svg, of the same run:

    removed  by                  test loss  accuracy  numbers stored
         0%                          0.112     0.964           3,392
        50%  magnitude               0.235     0.934           1,696
        50%  exact diagonal          0.154     0.954           1,696
        50%  eigenbasis of KFAC      0.112     0.964           9,722
        90%  magnitude               2.170     0.213             339
        90%  exact diagonal          2.301     0.113             339
        90%  eigenbasis of KFAC      0.130     0.966           5,325

Half of the coordinates of the eigenbasis do nothing, and nine tenths next to nothing. But they are
coordinates, not weights: rotated back, W = Q_B C Q_Aᵀ has no zeros, and the layer is a product of
three matrices, of which only C is sparse. The bases have to be stored, too. The last column counts
the entries of C that are left and the columns of both bases that they use (but for no way where
the entries are), and in a net this small they are fewer than the weights only where nearly all is
removed: for equal numbers stored, entries of W are the better choice here. What the eigenbasis
shows is in how few directions the loss is curved.

Run it with `python examples/pruning.py [--out DIRECTORY]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
TRAINING = 1300  # digits of 1,797; the others are for testing
WIDTH, EPOCHS = 32, 30
FRACTIONS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
COLOURS = {"magnitude": "#6b7280", "exact diagonal": "#c2410c", "eigenbasis of KFAC": "#0b5fa5"}

Data = tuple[Tensor, Tensor]  # images of shape (N, 64) in [0, 1], labels of shape (N,)
Layers = dict[str, "Layer"]  # by the name of the weight


class Layer(NamedTuple):
    """A weight as U C Vᵀ, and the curvature along each coordinate; no bases: U = I, V = I."""

    C: Tensor
    curvature: Tensor
    bases: tuple[Tensor, Tensor] | None

    def weight(self) -> Tensor:
        """U C Vᵀ, of shape (out, in)."""
        return self.C if self.bases is None else self.bases[0] @ self.C @ self.bases[1].mT

    def numbers(self) -> int:
        """How many there are to store: of C, and in the columns of U and V that it uses."""
        left, bases = self.C != 0, 0
        if self.bases is not None:
            (U, V), rows, columns = self.bases, left.any(1), left.any(0)
            bases = len(U) * int(rows.sum()) + len(V) * int(columns.sum())
        return int(left.sum()) + bases


def digits() -> tuple[Data, Data]:
    """Training and test data, split at random."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float64) / 16, torch.tensor(data.target)
    train, test = torch.randperm(len(images)).tensor_split([TRAINING])
    return (images[train], labels[train]), (images[test], labels[test])


def trained(width: int, epochs: int, data: Data) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return model


def decompositions(model: nn.Module, data: Data) -> dict[str, Layers]:
    """For each way of pruning: every weight in its coordinates, with the curvature along them."""
    weights = {n: p.detach() for n, p in model.named_parameters() if p.ndim == 2}
    loss, example = nn.CrossEntropyLoss(), data[0][:8]
    alone = fxkfac.trace(model, example, structure={"*": "diagonal"})
    diagonal = fxkfac.kfac(alone, loss, data)
    factors = fxkfac.kfac(fxkfac.trace(model, example), loss, data, separate_weight_and_bias=True)
    return {
        "magnitude": {n: Layer(W, torch.ones_like(W), None) for n, W in weights.items()},
        "exact diagonal": {n: Layer(W, diagonal[n].diagonal, None) for n, W in weights.items()},
        "eigenbasis of KFAC": {n: in_eigenbasis(W, factors[n]) for n, W in weights.items()},
    }


def in_eigenbasis(W: Tensor, block: fxkfac.Block) -> Layer:
    """W of shape (out, in) as Q_B C Q_Aᵀ, with curvature λ_B λ_A along the entries of C."""
    (λ_A, Q_A), (λ_B, Q_B) = torch.linalg.eigh(block.A), torch.linalg.eigh(block.B)
    return Layer(Q_B.mT @ W @ Q_A, torch.outer(λ_B.clamp_min(0), λ_A.clamp_min(0)), (Q_B, Q_A))


def pruned(layers: Layers, fraction: float) -> Layers:
    """All layers without the given fraction of their coordinates, those of least saliency."""
    saliency = torch.cat([(x.curvature * x.C**2 / 2).flatten() for x in layers.values()])
    keep = torch.ones_like(saliency)
    keep[saliency.argsort(stable=True)[: round(fraction * len(saliency))]] = 0
    parts = keep.split([x.C.numel() for x in layers.values()])
    return {
        name: layer._replace(C=layer.C * part.view_as(layer.C))
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }


def evaluated(model: nn.Module, layers: Layers, data: Data) -> tuple[float, float]:
    """Loss and accuracy with these weights in place of the model's own."""
    weights = {name: layer.weight() for name, layer in layers.items()}
    logits = torch.func.functional_call(model, weights, data[0])
    loss = nn.functional.cross_entropy(logits, data[1]).item()
    return loss, (logits.argmax(1) == data[1]).double().mean().item()


def draw(losses: dict[str, list[float]], before: float, path: Path) -> None:
    """Test loss over what is removed, a curve for each way."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in losses.items():
        axis.plot((0, *FRACTIONS), [before, *curve], "o-", color=COLOURS[name], label=name, lw=2)
    axis.axhline(before, color="#9ca3af", lw=1, ls=":")
    axis.axvline(0.5, color="#9ca3af", lw=1, ls=":")
    axis.set(
        yscale="log",
        xlabel="fraction of coordinates removed, over all layers",
        ylabel="test loss, without retraining",
        title="Pruning a small net on handwritten digits",
    )
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def report(model: nn.Module, ways: dict[str, Layers], test: Data, out: Path) -> None:
    """Prune in all ways, print losses and accuracies, and draw them."""
    entire = ways["magnitude"]
    before, accuracy = evaluated(model, entire, test)
    weights = sum(layer.numbers() for layer in entire.values())
    print(f"{'removed':>7}  {'by':<20}{'test loss':>9}{'accuracy':>10}{'numbers stored':>16}")
    print(f"{0:>7.0%}  {'':<20}{before:>9.3f}{accuracy:>10.3f}{weights:>16,}")
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for fraction in FRACTIONS:
        for name, layers in ways.items():
            left = pruned(layers, fraction)
            loss, accuracy = evaluated(model, left, test)
            losses[name].append(loss)
            numbers = sum(layer.numbers() for layer in left.values())
            print(f"{fraction:>7.0%}  {name:<20}{loss:>9.3f}{accuracy:>10.3f}{numbers:>16,}")
    draw(losses, before, out / "pruning.svg")
    print(f"Wrote {out / 'pruning.svg'}")


def main(out: Path) -> None:
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    model = trained(WIDTH, EPOCHS, train)
    report(model, decompositions(model, train), test, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main(arguments.out)
