"""Sections 2.1 and 2.2: the empirical risk, and what layers see. Equation 1, Snippets 1 and 2.

The risk is R Σ_n c(f_n, y_n). A `Likelihood` keeps the criterion c apart from the factor R, which
belongs to the whole data set; the tapped graph hands over what enters and leaves every layer.
"""

from __future__ import annotations

import torch
from setting import classes, mlp, rand, run, same
from torch import nn

import fxkfac
from fxkfac.graph.tap import Taps

N, DIMS = 10, (5, 4, 3)  # targets may be tensors; dim Y is 60


def square_loss() -> None:
    """c = ½‖f − y‖², and R is 2 or 2/(N dim Y). Equation 1, Example 1, Snippet 1."""
    f, y = rand(N, *DIMS), rand(N, *DIMS, seed=1)
    for reduction, R in {"sum": 2, "mean": 2 / (N * 60)}.items():
        loss = nn.MSELoss(reduction=reduction)
        likelihood = fxkfac.likelihood_of(loss)
        assert likelihood.reduction_factor(likelihood.count(f, y)) == R
        same(likelihood.nll(f, y), (f - y).square().flatten(1).sum(1) / 2)
        same(R * likelihood.criterion(f, y), loss(f, y))
        print(f"  {reduction}: R = {R:.4g}, loss {loss(f, y):.6f}")


def cross_entropy() -> None:
    """c = −log softmax(f)_y, and R is 1 or 1/(N dim Y). Equation 1, Example 2, Snippet 1."""
    f, y = rand(N, 6, *DIMS), classes(N, *DIMS, count=6)
    for reduction, R in {"sum": 1, "mean": 1 / (N * 60)}.items():
        loss = nn.CrossEntropyLoss(reduction=reduction)
        likelihood = fxkfac.likelihood_of(loss)
        assert likelihood.reduction_factor(likelihood.count(f, y)) == R
        log_σ = f.log_softmax(1).gather(1, y.unsqueeze(1))
        same(likelihood.nll(f, y), -log_σ.flatten(1).sum(1))
        same(R * likelihood.criterion(f, y), loss(f, y))
        print(f"  {reduction}: R = {R:.4g}, loss {loss(f, y):.6f}")


def parts_of_a_data_set() -> None:
    """Criteria and counts of parts add up, where means do not. Caveat 1."""
    f, y, loss = rand(N, 3), classes(N), nn.CrossEntropyLoss()
    likelihood, parts = fxkfac.likelihood_of(loss), [slice(0, 3), slice(3, N)]
    c = torch.stack([likelihood.criterion(f[p], y[p]) for p in parts]).sum()
    R = likelihood.reduction_factor(sum(likelihood.count(f[p], y[p]) for p in parts))
    same(R * c, loss(f, y))
    mean_of_means = torch.stack([loss(f[p], y[p]) for p in parts]).mean()
    assert abs(mean_of_means - loss(f, y)) > 1e-3
    print(f"  risk {R * c:.6f}, mean of the parts' means {mean_of_means:.6f}")


def inputs_and_outputs_of_layers() -> None:
    """What enters and leaves every layer, by taps in the graph and no hooks. Snippet 2."""
    net, x = mlp(4, 3, 2), rand(6, 4)
    program, taps = fxkfac.trace(net, x), Taps()
    prediction = program.run(x, sink=taps).prediction
    same(prediction, net(x))
    weights = [k for k, use in enumerate(program.uses) if not use.is_bias]
    for k, (layer, enters) in zip(weights, [(net[0], x), (net[2], net[:2](x))], strict=True):
        found = taps.inputs[k], taps.outputs[program.uses[k].tap]
        same(found[0], enters)
        same(found[1], layer(enters))
        print(f"  {program.uses[k].parameter}: {tuple(found[0].shape)} -> {tuple(found[1].shape)}")


if __name__ == "__main__":
    run(globals())
