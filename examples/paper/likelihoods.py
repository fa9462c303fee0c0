"""Section 2.3: a net is a likelihood of its labels. Examples 3 and 4, Snippet 3.

Minimising the risk is maximising a likelihood r(y | f): c = −log r up to a constant.
"""

from __future__ import annotations

import math

import torch
from setting import classes, mlp, numbers, rand, rounded, run, same
from torch import nn
from torch.distributions import Categorical, MultivariateNormal

import fxkfac

SQUARE, ENTROPY = map(fxkfac.likelihood_of, (nn.MSELoss(), nn.CrossEntropyLoss()))


def square_loss_is_a_gaussian() -> None:
    """c = −log N(y | f, I) − (C/2) log 2π. Example 3."""
    f, y = rand(6, 3), rand(6, 3, seed=1)
    gaussian = MultivariateNormal(f, torch.eye(3).to(f))
    constant = 3 / 2 * math.log(2 * math.pi)
    same(SQUARE.nll(f, y), -gaussian.log_prob(y) - constant)
    print(f"  −log N − c = {constant:.6f} for each of {len(f)} data")


def cross_entropy_is_a_categorical() -> None:
    """c = −log C(y | softmax(f)). Example 4."""
    f, y = rand(6, 3), classes(6)
    same(ENTROPY.nll(f, y), -Categorical(f.softmax(1)).log_prob(y))
    print(f"  {rounded(ENTROPY.nll(f, y))}")


def every_factor_has_the_same_minimum() -> None:
    """R scales the gradient of the risk and turns it nowhere: it moves no minimum. Section 2.3."""
    net, x, y = mlp(4, 3), rand(6, 4), classes(6)
    slopes = []
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        slopes.append(torch.autograd.grad(loss(net(x), y), net[0].weight)[0])
    same(6 * slopes[0], slopes[1])
    print(f"  gradients of 'sum' are those of 'mean' times {len(x)}")


def labels_of_a_gaussian() -> None:
    """Labels drawn for the square loss have mean f and covariance I. Snippet 3."""
    f = rand(1, 3).expand(100_000, 3)
    drawn = SQUARE.sample(f, numbers(0))
    off = (drawn.mean(0) - f[0]).abs().max(), (drawn.T.cov() - torch.eye(3)).abs().max()
    assert max(off) < 5 * (2 / len(f)) ** 0.5  # five standard deviations of a variance
    print(f"  {len(f)} draws: mean off by {off[0]:.4f}, covariance by {off[1]:.4f}")


def labels_of_a_categorical() -> None:
    """Labels drawn for the cross-entropy have the frequencies softmax(f). Snippet 3."""
    f = rand(1, 4).expand(100_000, 4)
    frequencies = ENTROPY.sample(f, numbers(0)).bincount(minlength=4) / len(f)
    off = (frequencies - f[0].softmax(0)).abs().max()
    assert off < 5 * (0.25 / len(f)) ** 0.5
    print(f"  {len(f)} draws: frequencies off by {off:.4f}")
    assert ENTROPY.sample(rand(6, 4, 2, 5), numbers(0)).shape == (6, 2, 5)  # one for each position
    again = [ENTROPY.sample(rand(6, 4), numbers(1)) for _ in range(2)]
    assert torch.equal(*again)


if __name__ == "__main__":
    run(globals())
