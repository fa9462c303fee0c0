"""Custom autograd Functions are nodes of the graph: their own backward is what runs."""

import numpy as np
import pytest
import torch
from drawn import StraightThrough, rand
from torch import nn
from torch.autograd import Function

import fxkfac
from fxkfac import exact
from fxkfac.errors import CaptureError, UnsupportedUse

MSE = nn.MSELoss()
close = torch.testing.assert_close
X, Y = rand(5, 4, seed=5), rand(5, 3, seed=6)
P = {"W": rand(4, 4), "V": rand(4, 3)}


class Reversed(Function):
    """The identity, whose gradient is turned round and scaled."""

    @staticmethod
    def forward(x, scale):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None

    generate_vmap_rule = True


class Both(Function):
    """Two outputs."""

    @staticmethod
    def forward(ctx, x):
        return x.round(), x.floor()

    @staticmethod
    def backward(ctx, g, h):
        return g + 2 * h


class ByNumpy(Function):
    """tanh, by numpy."""

    @staticmethod
    def forward(ctx, x):
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].square())


class Noisy(Function):
    """Noise forward, none backward."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class OwnLinear(Function):
    """x W with a weight gradient of its own."""

    @staticmethod
    def forward(x, W):
        return x @ W

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return g @ W.T, 2 * x.T @ g

    generate_vmap_rule = True


def rounded(params, x):
    return StraightThrough.apply(x @ params["W"]) @ params["V"]


def reversed_(params, x):
    return Reversed.apply(x @ params["W"], 0.5).tanh() @ params["V"]


def scaled_by_a_size(params, x):
    return Reversed.apply(x @ params["W"], x.shape[1]) @ params["V"]


def two_outputs(params, x):
    a, b = Both.apply(x @ params["W"])
    return (a * b.sin()) @ params["V"]


def by_numpy(params, x):
    return ByNumpy.apply(x @ params["W"]) @ params["V"]


def before_ops_in_place(params, x):
    h = StraightThrough.apply(x @ params["W"]).clone()
    h.mul_(2)
    return h @ params["V"]


def once_without_gradient(params, x):
    h = x @ params["W"]
    with torch.no_grad():
        fixed = StraightThrough.apply(h)
    return (h * fixed + StraightThrough.apply(h)) @ params["V"]


def inside_a_derivative(params, x):
    z = x.detach().requires_grad_()
    y = Reversed.apply((z @ params["W"]).sin(), 0.5).tanh() @ params["V"]
    return torch.autograd.grad(y.sum(), z, create_graph=True)[0]


MODELS = [
    rounded,
    reversed_,
    scaled_by_a_size,
    two_outputs,
    by_numpy,
    before_ops_in_place,
    once_without_gradient,
    inside_a_derivative,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_gradients_are_those_of_the_users_backward(model):
    program = fxkfac.trace(model, X, P)
    for n in (5, 3):
        y = rand(n, 4 if model is inside_a_derivative else 3)
        found = fxkfac.check(program, MSE, (X[:n], y))
        assert set(found) == {"W", "V"}
        assert max(found.values()) < 1e-12
    y = rand(1, *program.run(X).prediction.shape[1:])
    if model is not inside_a_derivative:
        factors = fxkfac.kfac(program, MSE, (X[:1], y), sharing="reduce")
        close(factors.dense("W"), exact.ggn(model, MSE, (X[:1], y), "W", P))


def test_noise_is_drawn_for_each_call():
    """Two calls with the same argument are not one."""

    def model(params, x):
        h = x @ params["W"]
        return (Noisy.apply(h) - Noisy.apply(h)) @ params["V"] + Noisy.apply(h)[:, :3]

    program = fxkfac.trace(model, X, P)
    bare = Noisy.apply(X @ P["W"])[:, :3]
    assert (program.run(X).prediction - bare).abs().max() > 0.5
    assert max(fxkfac.check(program, MSE, (X, Y)).values()) < 1e-12


def own(params, x):
    return OwnLinear.apply(x, params["W"]).tanh() @ params["V"]


def test_a_parameter_that_enters_one_is_refused_by_its_name():
    with pytest.raises(UnsupportedUse, match=r"W enters OwnLinear at .*test_custom\.py:\d+ in own"):
        fxkfac.trace(own, X, P)


def test_or_has_an_exact_block():
    program = fxkfac.trace(own, X, P, unsupported="dense")
    found = fxkfac.kfac(program, MSE, (X, Y))
    close(found.dense("W"), exact.ggn(own, MSE, (X, Y), "W", P))


def test_an_exact_block_is_of_the_users_backward():
    """A graph that has lost it gives another diagonal, of parameters that no tap proves."""

    def model(params, x):
        return Reversed.apply(torch.sin(x @ params["W"].exp()), 3.0) @ params["V"]

    program = fxkfac.trace(model, X, P, unsupported="diagonal")
    found = fxkfac.kfac(program, MSE, (X, Y))["W"].diagonal.flatten()
    close(found, exact.ggn(model, MSE, (X, Y), "W", P).diagonal())


def test_an_exact_block_needs_the_gradient_of_each_datum():
    def model(params, x):
        return StraightThrough.apply(x @ params["W"].exp()) @ params["V"]

    program = fxkfac.trace(model, X, P, unsupported="diagonal")
    with pytest.raises(UnsupportedUse, match=r"StraightThrough.*setup_context"):
        fxkfac.kfac(program, MSE, (X, Y))


def test_a_tensor_that_is_no_argument_is_refused():
    """A graph would hold the value that it had."""

    def model(params, x):
        class Hidden(Function):
            @staticmethod
            def forward(ctx, h):
                return (h @ params["W"]).round()

            @staticmethod
            def backward(ctx, g):
                return g @ params["W"].T

        return Hidden.apply(x @ params["W"]) @ params["V"]

    with pytest.raises(CaptureError, match=r"Hidden reads p0_w|Hidden reads \w+.*pass it as one"):
        fxkfac.trace(model, X, P)


def test_the_applied_function_is_put_back():
    before = Function.__dict__["apply"]
    fxkfac.trace(rounded, X, P)
    assert Function.__dict__["apply"] is before


def test_drawn_and_printed():
    program = fxkfac.trace(rounded, X, P)
    names = {name for _, name in program.to_networkx().nodes(data="op")}
    assert "StraightThrough" in names
    assert "W" in str(program)
