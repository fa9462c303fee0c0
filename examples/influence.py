"""Which training digits help or harm a test digit, and what leaving them out really does.

Softmax regression and a net with one hidden layer are trained on some of scikit-learn's digits,
with weight decay, to convergence. The influence of a training digit on the loss at a test digit
says how that loss would change if the digit were left out. Some digits, drawn at random, are left
out in turn; the model is trained again without, to convergence, and both changes are compared.

The net's loss has many minima, and which of them is found has little to do with one digit. So
training starts again from where it ended with all digits: what is asked is how that minimum moves.
It is an isolated one, as the Hessian with decay has a Cholesky factor; of four initial points, the
one is taken whose loss gets lowest.

The Hessian has the errors of the first order alone, the exact GGN its own, too, and KFAC and EKFAC
also those of Kronecker factors and of no curvature between layers. The size is that of predicted
over that of actual changes. A run printed, in 28 s of one core's time (the picture,
docs/pictures/influence.png, is of the same run):

    1000 training digits, 100 of them left out in turn; 60 test digits
                                     correlation
      model               curvature  all pairs  mean over test digits  size
      softmax regression  KFAC           0.951                  0.956  1.60
      softmax regression  EKFAC          0.952                  0.958  1.59
      softmax regression  exact GGN      1.000                  1.000  0.96
      softmax regression  Hessian        1.000                  1.000  0.96
      net                 KFAC           0.898                  0.902  2.25
      net                 EKFAC          0.895                  0.903  2.24
      net                 exact GGN      0.974                  0.953  1.02
      net                 Hessian        0.999                  1.000  0.93

Run it with `python examples/influence.py [--out DIRECTORY]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
N_TRAIN, N_TEST, LEFT_OUT, STARTS = 1000, 60, 100, 4
SHOWN = 4  # on either side of a test digit in the picture
WEIGHT_DECAY = 2e-2  # λ of ½ λ ‖θ‖², and so the damping
LOSS = nn.CrossEntropyLoss()
MODELS = {
    "softmax regression": lambda: nn.Linear(64, 10),
    "net": lambda: nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)),
}

Data = tuple[Tensor, Tensor]
Objective = Callable[[Tensor], Tensor]


def digits(n: int, m: int) -> tuple[Data, Data]:
    """n training and m test digits, as 64 numbers each, drawn without replacement."""
    loaded = load_digits()
    x = torch.tensor(loaded.data, dtype=torch.float64) / 16
    y = torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:n], order[n : n + m]
    return (x[train], y[train]), (x[test], y[test])


def losses(model: nn.Module, data: Data, θ: Tensor) -> Tensor:
    """(n,): each datum's own loss, with the entries of θ for the model's parameters."""
    named = dict(model.named_parameters())
    parts = θ.split([p.numel() for p in named.values()])
    given = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
    return cross_entropy(functional_call(model, given, data[0]), data[1], reduction="none")


def minimum(f: Objective, size: int) -> Tensor:
    """The z where full-batch L-BFGS ends that starts at zero, which is checked to be stationary."""
    z = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    limits = {"max_iter": 3000, "max_eval": 6000, "tolerance_grad": 1e-8, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([z], history_size=50, line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = f(z)
        value.backward()
        return value

    optimizer.step(closure)
    left = grad(f)(z.detach()).abs().max().item()
    if left > 1e-7:
        raise RuntimeError(f"not at a minimum: an entry of the gradient is {left:.1e}.")
    return z.detach()


def objective(model: nn.Module, data: Data, without: int | None = None) -> Objective:
    """θ -> (1 / N) Σ_n c_n + ½ λ ‖θ‖², the sum without one of the N data."""
    weights = torch.full(data[1].shape, 1 / len(data[1]), dtype=torch.float64)
    if without is not None:
        weights[without] = 0
    return lambda θ: weights @ losses(model, data, θ) + WEIGHT_DECAY / 2 * θ.square().sum()


def train(name: str, data: Data, starts: int) -> nn.Module:
    """The model at the lowest of the minima that are found from some initial points."""
    found = []
    for seed in range(starts):
        torch.manual_seed(100 * SEED + seed)
        model = MODELS[name]().double()
        start = parameters_to_vector(model.parameters()).detach()
        f = objective(model, data)
        θ = start + minimum(lambda z, f=f, start=start: f(start + z), len(start))
        vector_to_parameters(θ, model.parameters())
        found.append((f(θ).item(), seed, model))
    return min(found)[2]


@dataclass(frozen=True)
class Fit:
    """A model at a minimum, the loss's Hessian there, and scores of all pairs by factors."""

    model: nn.Module
    train: Data
    test: Data
    hessian: Tensor
    scores: dict[str, Tensor]


def fit(name: str, n_train: int, n_test: int, starts: int) -> Fit:
    data, test = digits(n_train, n_test)
    model = train(name, data, starts)
    program = fxkfac.trace(model, data[0])
    kfac = fxkfac.kfac(program, LOSS, data)
    factors = {"KFAC": kfac, "EKFAC": fxkfac.ekfac(program, LOSS, data, kfac)}
    scores = {
        name: fxkfac.influence(program, LOSS, f, data, test, damping=WEIGHT_DECAY)
        for name, f in factors.items()
    }
    return Fit(model, data, test, fxkfac.exact.hessian(model, LOSS, data), scores)


def with_decay(C: Tensor) -> Tensor:
    return C + WEIGHT_DECAY * torch.eye(len(C), dtype=C.dtype)


def dense_scores(fit: Fit, C: Tensor) -> Tensor:
    """`fxkfac.influence` with a dense matrix for C."""

    def own(θ: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return losses(fit.model, (x[None], y[None]), θ)[0]

    θ, each = parameters_to_vector(fit.model.parameters()).detach(), vmap(grad(own), (None, 0, 0))
    return -each(θ, *fit.train) @ torch.linalg.solve(with_decay(C), each(θ, *fit.test).T)


def retrained_changes(fit: Fit, which: Tensor) -> Tensor:
    """(left out, n_test): how the loss at every test digit changes without a training digit."""
    θ = parameters_to_vector(fit.model.parameters()).detach()
    # Coordinates in which the Hessian at θ is the identity: L-BFGS needs few steps there.
    basis = torch.linalg.inv(torch.linalg.cholesky(with_decay(fit.hessian))).T
    found = []
    for i in which.tolist():
        f = objective(fit.model, fit.train, without=i)
        found.append(θ + basis @ minimum(lambda z, f=f: f(θ + basis @ z), len(θ)))
    after = torch.stack([losses(fit.model, fit.test, each) for each in found])
    return after - losses(fit.model, fit.test, θ)


def drawn(n: int, k: int) -> Tensor:
    """k of n digits."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SEED))[:k]


def correlations(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """Over all pairs together; and over training digits for each test digit, the mean."""
    m = predicted.shape[1]
    together = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    each = torch.corrcoef(torch.cat([predicted.T, actual.T]))[:m, m:].diagonal()
    return together.item(), each.mean().item()


def draw(fit: Fit, predicted: Tensor, actual: Tensor, path: Path) -> None:
    """Predicted against actual changes; and for two test digits, who helps and who harms them."""
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    axis = left.subplots()
    axis.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0, label="equal")
    axis.scatter(predicted, actual, s=6, alpha=0.35, color="#0b5fa5", linewidths=0)
    axis.set(
        xlabel="predicted: −score / N",
        ylabel="actual, trained again",
        title="Change of a test loss\nwithout one training digit",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    scores = fit.scores["EKFAC"]
    worst = scores.abs().sum(0).topk(2).indices.tolist()
    grid = right.subplots(4, SHOWN + 1)
    for k, j in enumerate(worst):
        _draw_digit(grid[2 * k, 0], fit.test, j, "test")
        grid[2 * k + 1, 0].axis("off")
        order = scores[:, j].argsort()
        for row, title, shown in ((0, "helps", order[:SHOWN]), (1, "harms", order.flip(0)[:SHOWN])):
            for column, i in enumerate(shown.tolist(), start=1):
                _draw_digit(grid[2 * k + row, column], fit.train, i, title)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _draw_digit(axis: plt.Axes, data: Data, i: int, what: str) -> None:
    axis.imshow(data[0][i].view(8, 8), cmap="gray_r")
    axis.set_title(f"{what}: a {int(data[1][i])}", fontsize=8, pad=2)
    axis.set_axis_off()


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    print(f"{N_TRAIN} training digits, {LEFT_OUT} of them left out in turn; {N_TEST} test digits")
    print("                                 correlation")
    print("  model               curvature  all pairs  mean over test digits  size")
    which = drawn(N_TRAIN, LEFT_OUT)
    for model in MODELS:
        fitted = fit(model, N_TRAIN, N_TEST, STARTS)
        actual = retrained_changes(fitted, which)
        ggn = fxkfac.exact.ggn(fitted.model, LOSS, fitted.train)
        dense = {"exact GGN": ggn, "Hessian": fitted.hessian}
        all_scores = fitted.scores | {name: dense_scores(fitted, C) for name, C in dense.items()}
        for name, scores in all_scores.items():
            predicted = -scores[which] / N_TRAIN
            pairs, each = correlations(predicted, actual)
            size = (predicted.norm() / actual.norm()).item()
            print(f"  {model:<18}  {name:<9}  {pairs:>9.3f}  {each:>21.3f}  {size:>4.2f}")
    draw(fitted, -fitted.scores["EKFAC"][which] / N_TRAIN, actual, out / "influence.png")
    print(f"Wrote {out / 'influence.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main(arguments.out)
