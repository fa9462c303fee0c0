"""Compiled code knows shapes and losses, and nothing of the values that it was made with."""

import pytest
import torch
from drawn import classes, generator, rand, seeded
from test_compiled import assert_close, assert_same, needs_compiler
from torch import nn
from torch.nn import functional as F

import fxkfac
from fxkfac.curvature.inductor import code
from fxkfac.errors import DataError
from fxkfac.likelihoods.losses import Categorical, Gaussian

X, Y = rand(9, 5), classes(9)
BACKENDS = ("inductor", "eager")


@pytest.fixture
def program():
    return fxkfac.trace(seeded(lambda: nn.Linear(5, 3)), X)


@pytest.fixture
def uncompiled(monkeypatch):
    """The graphs themselves, in the place of their code."""
    monkeypatch.setattr(code, "_compiled", lambda module, given, options: module)


def test_another_loss_of_equal_weights(program, uncompiled):
    """The first one's weights change, and the second one's code does not."""
    one, other = (nn.CrossEntropyLoss(weight=rand(3).abs() + 1) for _ in range(2))
    fxkfac.kfac(program, one, (X, Y), fisher="empirical", backend="inductor")
    one.weight.mul_(torch.arange(3) + 1.0)
    found, expected = (
        fxkfac.kfac(program, other, (X, Y), fisher="empirical", backend=b) for b in BACKENDS
    )
    assert_same(found, expected, 1e-10)


@needs_compiler
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_numbers_that_are_to_be_negated(program, fisher):
    """A tensor may lie in memory with the other sign."""

    def negated(t):
        found = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert found.is_neg()
        return found

    data = negated(X), negated(rand(9, 3, seed=1))
    found, expected = (
        fxkfac.step(program, nn.MSELoss(), data, fisher=fisher, backend=b) for b in BACKENDS
    )
    assert_same(found.factors, expected.factors, 1e-10)
    assert_close(found.loss, expected.loss, 1e-10)


class Beside(nn.Module):
    """Draws numbers of which the prediction has nothing, before those that it has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        beside = self.b(F.dropout(h, 0.3, self.training)) + torch.rand(3)
        return {"beside": beside, "logits": self.b(F.dropout(h, 0.3, self.training))}


@needs_compiler
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_numbers_that_are_drawn_for_nothing(fisher):
    program = fxkfac.trace(seeded(Beside).train(), X)
    found, expected = (
        fxkfac.kfac(
            program,
            nn.CrossEntropyLoss(),
            (X, Y),
            fisher=fisher,
            generator=generator(),
            backend=b,
        )
        for b in BACKENDS
    )
    assert_same(found, expected, 1e-10)


class Emptied(nn.Module):
    """Padding is written over before a mean, whose gradient is the same at every place."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, real):
        h = self.layer(x)
        h[~real.unsqueeze(-1).repeat(1, 1, 6)] = 0.0
        return self.head(h.sum(1) / real.sum(1, keepdim=True))


@needs_compiler
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_an_index_into_a_gradient_that_is_the_same_everywhere(fisher):
    """Inductor alone writes such a copy into the memory that all places share."""
    model, x, y = seeded(Emptied), rand(4, 6, 4), classes(4)
    real = torch.arange(6) < torch.tensor([6, 3, 4, 5]).unsqueeze(1)
    program = fxkfac.trace(model, (x, real))
    found, expected = (
        fxkfac.step(
            program,
            nn.CrossEntropyLoss(),
            ((x, real), y),
            fisher=fisher,
            generator=generator(),
            backend=b,
        )
        for b in BACKENDS
    )
    assert_same(found.factors, expected.factors, 1e-10)
    for name, g in expected.gradients.items():
        assert_close(found.gradients[name], g, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", [Y[:8], Y.to(torch.uint8)], ids=["fewer", "uint8"])
def test_targets_that_do_not_fit(program, backend, targets, uncompiled):
    with pytest.raises(DataError, match="batch 0: targets of dtype"):
        fxkfac.kfac(program, nn.CrossEntropyLoss(), (X, targets), fisher="mc", backend=backend)


def scaled(factor):
    class Scaled(Gaussian):
        def gradient(self, f, y):
            return factor * (f - y)

    return Scaled()


class Otherwise(Categorical):
    """Draws labels in another way."""

    def sample(self, f, generator):
        return torch.multinomial(f.softmax(-1), 1, generator=generator).squeeze(1)


def test_likelihoods_of_one_name(program, uncompiled):
    y = rand(9, 3)
    for loss in (scaled(1.0), scaled(2.0)):
        found, expected = (
            fxkfac.kfac(program, loss, (X, y), fisher="empirical", backend=b) for b in BACKENDS
        )
        assert_same(found, expected, 1e-10)


def test_a_likelihood_that_draws_labels_itself(program, uncompiled):
    found, expected = (
        fxkfac.kfac(program, Otherwise(), (X, Y), fisher="mc", generator=generator(), backend=b)
        for b in BACKENDS
    )
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_keeps_no_graph_of_the_targets(program, backend, uncompiled):
    y = rand(9, 3).requires_grad_()
    step = fxkfac.step(program, nn.MSELoss(), (X, y), fisher="empirical", backend=backend)
    assert not step.loss.requires_grad
    assert not any(g.requires_grad for g in step.gradients.values())
