"""Which training digits help or harm which test digits, and what leaving them out really does.

A small net is trained to convergence on some of scikit-learn's digits, with weight decay. The
influence of each training digit on the loss at each test digit then says how that loss would change
if the digit were left out; for some of them the net is trained again without, from the same
optimum, and both are compared.

Run it with `python examples/influence.py [--out DIRECTORY]`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
N_TRAIN, N_TEST, LEFT_OUT = 300, 60, 30
HIDDEN = 8
WEIGHT_DECAY = 1e-2  # λ of ½ λ ‖θ‖², and so the damping
LOSS = nn.CrossEntropyLoss()

Data = tuple[Tensor, Tensor]


def digits(n: int, m: int) -> tuple[Data, Data]:
    """n training and m test digits, as 64 numbers each, drawn without replacement."""
    loaded = load_digits()
    x = torch.tensor(loaded.data, dtype=torch.float64) / 16
    y = torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:n], order[n : n + m]
    return (x[train], y[train]), (x[test], y[test])


def net() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()


def train(model: nn.Module, data: Data, weights: Tensor) -> nn.Module:
    """Minimise Σ_n w_n c_n + ½ λ ‖θ‖² by full-batch L-BFGS; the model is copied."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=3000,
        max_eval=6000,
        history_size=50,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        each = nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")
        decay = sum(p.square().sum() for p in parameters)
        value = weights @ each + WEIGHT_DECAY / 2 * decay
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    return model


def losses(model: nn.Module, data: Data) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")


def retrained_changes(model: nn.Module, train_data: Data, test: Data, which: Tensor) -> Tensor:
    """(left out, n_test): how the loss at every test digit changes without a training digit."""
    n = len(train_data[0])
    changes = []
    for i in which:
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        weights[i] = 0
        without = train(model, train_data, weights)
        changes.append(losses(without, test) - losses(model, test))
    return torch.stack(changes)


def correlations(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """Over all pairs together; and over training digits for each test digit, the mean."""
    together = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    each = [torch.corrcoef(torch.stack([p, a]))[0, 1] for p, a in zip(predicted.T, actual.T)]
    return together.item(), torch.stack(each).mean().item()


def run(n_train: int, n_test: int, left_out: int) -> dict[str, object]:
    """Train, score all pairs, and train again without some."""
    train_data, test = digits(n_train, n_test)
    uniform = torch.full((n_train,), 1 / n_train, dtype=torch.float64)
    model = train(net(), train_data, uniform)
    program = fxkfac.trace(model, train_data[0])
    factors = fxkfac.kfac(program, LOSS, train_data)
    scores = fxkfac.influence(program, LOSS, factors, train_data, test, damping=WEIGHT_DECAY)
    which = chosen(scores, left_out)
    predicted = -scores[which] / n_train
    actual = retrained_changes(model, train_data, test, which)
    return {
        "train": train_data,
        "test": test,
        "model": model,
        "scores": scores,
        "predicted": predicted,
        "actual": actual,
        "correlations": correlations(predicted, actual),
    }


def chosen(scores: Tensor, number: int) -> Tensor:
    """Training digits to leave out: drawn at random, so that the comparison is fair."""
    return torch.randperm(len(scores), generator=torch.Generator().manual_seed(SEED))[:number]


if __name__ == "__main__":
    import time

    torch.set_num_threads(1)
    t = time.time()
    r = run(N_TRAIN, N_TEST, LEFT_OUT)
    print(r["correlations"], time.time() - t)
