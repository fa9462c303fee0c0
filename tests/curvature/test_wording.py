"""Losses that differ have other texts, and those that do not have the same."""

from functools import partial

import pytest
import torch
from drawn import rand
from torch import distributions, nn

import fxkfac
from fxkfac.errors import MergeError
from fxkfac.likelihoods.losses import loss_text
from fxkfac.likelihoods.wording import worded

of = fxkfac.Likelihood.from_distribution


def scaled(k):
    class Squares(fxkfac.Likelihood):
        def nll(self, f, y):
            return k * (f - y).square().sum(1)

    return Squares()


class Weighted(fxkfac.Likelihood):
    def __init__(self, weights):
        self.weights = weights

    def nll(self, f, y):
        return (f - y).square().sum(1)


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


def later(position):
    weights = torch.ones(2000)
    weights[position] = 2.0
    return weights


PAIRS = {
    "closed over": (lambda: scaled(1.0), lambda: scaled(2.0)),
    "lambdas": (
        lambda: of(lambda f: distributions.Poisson(f.exp())),
        lambda: of(lambda f: distributions.Normal(f, 1e-3)),
    ),
    "constants": (
        lambda: of(lambda f: distributions.Normal(f, 1.0)),
        lambda: of(lambda f: distributions.Normal(f, 2.0)),
    ),
    "modules": (lambda: Weighted(linear(0)), lambda: Weighted(linear(1))),
    "large tensors in a list": (lambda: Weighted([later(9)]), lambda: Weighted([later(10)])),
    "partials": (lambda: Weighted(partial(pow, 2)), lambda: Weighted(partial(pow, 3))),
    "mappings": (lambda: Weighted({"a": {1, 2}}), lambda: Weighted({"a": {1, 3}})),
    "class weights": (
        lambda: nn.CrossEntropyLoss(later(3)),
        lambda: nn.CrossEntropyLoss(later(4)),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_equal_where_the_loss_is(pair):
    first, second = PAIRS[pair]
    assert loss_text(first()) == loss_text(first())
    assert loss_text(first()) != loss_text(second())
    assert " at 0x" not in loss_text(first())


def test_what_holds_itself_has_a_text():
    held = [1]
    held.append(held)
    assert worded(held) == "[1, ..]"


def test_parts_of_two_losses_do_not_add_up(tmp_path):
    model, data = nn.Linear(3, 2).double(), (rand(6, 3), rand(6, 2, seed=1))
    program = fxkfac.trace(model, data[0])
    with pytest.raises(MergeError):
        fxkfac.kfac(program, scaled(1.0), data) + fxkfac.kfac(program, scaled(2.0), data)
    accumulation = fxkfac.Accumulation(program, scaled(1.0))
    accumulation.add(*data)
    fxkfac.save(accumulation, tmp_path / "sums")
    assert fxkfac.resume(tmp_path / "sums", program, scaled(1.0)).n == 6
    with pytest.raises(MergeError, match="loss is"):
        fxkfac.resume(tmp_path / "sums", program, scaled(2.0))
