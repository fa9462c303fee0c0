"""Loss and gradients of `fxkfac.step`, which scales what goes back and not what arrives."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fxkfac

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def _data(n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 5, dtype=torch.float64)
    return x, torch.arange(n) % 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [2, 1, 6]])
def test_batches_are_weighed_by_the_targets_that_count(backend, reduction, sizes):
    model, (x, y) = _net(), _data()
    y[:3] = torch.tensor([-100, -100, 1])  # none counts in a first batch of two
    loss = nn.CrossEntropyLoss(reduction=reduction)
    program = fxkfac.trace(model, x)
    value = loss(model(x), y)
    expected = torch.autograd.grad(value, list(model.parameters()))
    batches = zip(x.split(sizes), y.split(sizes), strict=True)
    step = fxkfac.step(program, loss, batches, backend=backend)
    assert_close(step.loss, value.detach())
    for name, g in zip(step.gradients, expected, strict=True):
        assert_close(step.gradients[name], g)


def test_gradients_have_memory_of_their_own():
    """The two biases have one gradient, which autograd gives out twice; one is a view of more."""
    params = {
        "W": torch.randn(5, 3, dtype=torch.float64),
        "b": torch.zeros(3, dtype=torch.float64),
        "c": torch.zeros(3, dtype=torch.float64),
        "d": torch.zeros(1, dtype=torch.float64),
    }
    x, y = _data()

    def model(params, x):
        join = torch.cat([params["d"], params["d"], params["d"]])
        return x @ params["W"] + params["b"] + params["c"] + join

    gradients = fxkfac.step(fxkfac.trace(model, x, params), nn.CrossEntropyLoss(), (x, y)).gradients
    before = {name: g.clone() for name, g in gradients.items()}
    gradients["b"].zero_()
    for name in ("W", "c", "d"):
        assert_close(gradients[name], before[name], rtol=0, atol=0)
    assert all(g.untyped_storage().nbytes() == g.nbytes for g in gradients.values())


def test_gradients_lie_as_their_parameters_do():
    model, (x, y) = _net(), _data()
    first = model[0]
    first.weight = nn.Parameter(first.weight.detach().T.contiguous().T)
    step = fxkfac.step(fxkfac.trace(model, x), nn.CrossEntropyLoss(), (x, y))
    assert step.gradients["0.weight"].stride() == first.weight.stride() == (1, 7)


def test_a_gradient_does_not_lie_in_the_users_memory():
    """Where the prediction is a parameter, its gradient is what a likelihood of one's own gave."""
    target = torch.randn(1, 4, dtype=torch.float64)
    kept = torch.ones_like(target)

    class Constant(fxkfac.Likelihood):
        reduction = "sum"

        def nll(self, prediction, target):
            return prediction.sum(1)

        def gradient(self, f, y):
            return kept

        def hessian_sqrt(self, f, y, v):
            return torch.zeros_like(f)

    params = {"p": torch.zeros(1, 4, dtype=torch.float64)}
    program = fxkfac.trace(lambda params, x: x + params["p"], target, params)
    step = fxkfac.step(program, Constant(), (torch.ones_like(target), target), fisher="type-2")
    step.gradients["p"].zero_()
    assert_close(kept, torch.ones_like(kept))
