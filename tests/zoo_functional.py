"""More of the zoo: functions of params and batch, ensembles, derivatives taken inside.

Registered into `zoo.ZOO`, in the same way and for the same tests.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from drawn import StraightThroughEach
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from zoo import Made, _mlp, _mlp_params, entry, rand

# --- functions of a dict of parameters and a batch ---


def _net(d_in=4, d_out=3):
    return nn.Sequential(nn.Linear(d_in, 5), nn.Tanh(), nn.Linear(5, d_out)).double()


def _tensors(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def _batch(n):
    return ({"x": rand(n, 4, seed=1), "y": rand(n, 3, seed=2)},)


@entry("functional", inputs=_batch, y=(3,), unshared=True)
def residual_of_batch():
    """A function of params and one batch with inputs and targets, as a log posterior takes it."""
    module = _net()
    return (lambda p, batch: functional_call(module, p, batch["x"]) - batch["y"]), _tensors(module)


@entry("functional", x=(4,), y=(3,), unshared=True)
def with_prior_and_aux():
    """functional_call next to a frozen copy of the same module at other parameters."""
    module, anchor = _net(), _net()

    def f(params, x):
        return functional_call(module, params, x) + anchor(x).detach()

    return f, _tensors(module)


@entry("functional", x=(4,), y=(3,), unshared=True)
def last_layer_swapped():
    """functional_call with some of the parameters swapped; the module keeps the others."""
    module = _net().requires_grad_(False)
    chosen = {name: p for name, p in _tensors(module).items() if name.startswith("2.")}
    return (lambda p, x: functional_call(module, p, (x,))), chosen


@entry("functional", x=(4,), y=(3,))
def flat_vector_of_parameters():
    """All parameters as one vector, cut into the layers' weights."""

    def f(params, x):
        W, b, V = params["theta"].split([20, 5, 15])
        return torch.tanh(x @ W.view(5, 4).T + b) @ V.view(3, 5).T

    return f, {"theta": 0.5 * torch.randn(40).double()}


@entry("functional", x=(4,), y=(3,), unshared=True)
def swapped_with_buffers():
    """functional_call of a module with batch norm's statistics swapped along, in eval mode."""
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    module = module.double().eval()
    statistics = {"1.running_mean": rand(5), "1.running_var": rand(5).square() + 1}
    return (lambda p, x: functional_call(module, {**p, **statistics}, (x,))), _tensors(module)


@entry("functional", x=(4,), y=(3,), expected="refused")
def custom_derivative_under_vmap():
    """A custom autograd.Function under vmap, whose derivative is not that of its value."""

    def one(params, x):
        h = StraightThroughEach.apply(params["first"]["W"] @ x + params["first"]["b"])
        return params["second"]["W"] @ h + params["second"]["b"]

    return vmap(one, (None, 0)), _mlp_params(4, 3)


# --- ensembles: one block for each member ---


def _members(make, number=2):
    modules = [make() for _ in range(number)]
    params, _ = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    return {name: p.detach() for name, p in params.items()}, base


@entry("ensembles", x=(4,), y=(3, 3))
def ensemble_of_modules():
    """stack_module_state and vmap of functional_call: members see the same data."""
    params, base = _members(_net, 3)
    one = lambda p, x: functional_call(base, p, (x,))  # noqa: E731
    return (lambda p, x: vmap(one, (0, None), out_dims=1)(p, x)), params


@entry("ensembles", x=(2, 4), y=(2, 3))
def ensemble_of_own_data():
    """Every member has data of its own."""
    params, base = _members(_net)
    one = lambda p, x: functional_call(base, p, (x,))  # noqa: E731
    return (lambda p, x: vmap(one, (0, 1), out_dims=1)(p, x)), params


@entry("ensembles", x=(4,), y=(3,))
def ensemble_mean():
    """The mean prediction of an ensemble."""
    params, base = _members(_net)
    one = lambda p, x: functional_call(base, p, (x,))  # noqa: E731
    return (lambda p, x: vmap(one, (0, None))(p, x).mean(0)), params


@entry("ensembles", x=(2, 4, 4), y=(2, 3))
def ensemble_of_conv_nets():
    """Convolutions under vmap over stacked parameters: groups."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    ).double()
    params, base = _members(make)
    one = lambda p, x: functional_call(base, p, (x,))  # noqa: E731
    return (lambda p, x: vmap(one, (0, None), out_dims=1)(p, x)), params


@entry("ensembles", x=(2,), y=(2, 2))
def ensemble_of_forces():
    """Forces of an ensemble: vmap over the parameters of the gradient in the input."""
    params, base = _members(lambda: _net(2, 1))
    energy = lambda p, x: functional_call(base, p, (x,)).sum()  # noqa: E731
    return (lambda p, x: vmap(grad(energy, 1), (0, None), out_dims=1)(p, x)), params


# --- derivatives inside ---


@entry("derivatives", x=(2,), y=(1,))
def heat_by_nested_jvp():
    """u_t − u_xx, with u(t, x), by jvp and jvp of jvp."""

    def f(params, z):
        net = partial(_mlp, params)
        t, x = (e.expand_as(z) for e in torch.eye(2, dtype=z.dtype))

        def slope(v):
            return lambda at: jvp(net, (at,), (v,))[1]

        return slope(t)(z) - jvp(slope(x), (z,), (x,))[1]

    return f, _mlp_params(2, 1)


@entry("derivatives", x=(2,), y=())
def heat_by_hessian():
    """u_t − u_xx by torch.func.jacrev and hessian of one datum, under vmap."""

    def one(params, z):
        u = lambda at: _mlp(params, at).squeeze(-1)  # noqa: E731
        return jacrev(u)(z)[0] - hessian(u)(z)[1, 1]

    return vmap(one, (None, 0)), _mlp_params(2, 1)


@entry("derivatives", x=(2,), y=(1,))
def heat_by_autograd():
    """u_t − u_xx by torch.autograd.grad twice, as physics-informed networks mostly have it."""

    def forward(m, z):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            u = m.net(z)
            (first,) = torch.autograd.grad(u.sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 1].sum(), z, create_graph=True)
        return first[:, :1] - second[:, 1:]

    return Made(forward, net=nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))


@entry("derivatives", x=(2,), y=(2,))
def jacobian_forward():
    """Rows of the Jacobian by jacfwd, summed."""
    return vmap(lambda p, x: jacfwd(partial(_mlp, p))(x).sum(0), (None, 0)), _mlp_params(2, 3)


@entry("derivatives", x=(2,), y=(3, 2))
def jacobian_of_the_sum():
    """jacrev of the sum over the batch: every datum's Jacobian, without vmap."""

    def f(params, x):
        return jacrev(lambda at: _mlp(params, at).sum(0))(x).movedim(1, 0)

    return f, _mlp_params(2, 3)


@entry("derivatives", x=(2,), y=(2,))
def pulled_back():
    """vjp of the network, applied to its own value."""

    def f(params, x):
        value, pull = vjp(partial(_mlp, params), x)
        return pull(value)[0]

    return f, _mlp_params(2, 3)


@entry("derivatives", x=(3,), y=(3,))
def hessian_vector_product():
    """jvp of grad: forward over reverse."""

    def f(params, x):
        slope = grad(lambda at: _mlp(params, at).sum())
        return jvp(slope, (x,), (torch.ones_like(x),))[1]

    return f, _mlp_params(3, 1)


@entry("derivatives", x=(2,), y=(1,))
def divergence():
    """The divergence of a vector field: the trace of jacfwd."""

    def one(params, x):
        return jacfwd(partial(_mlp, params))(x).trace().unsqueeze(0)

    return vmap(one, (None, 0)), _mlp_params(2, 2)


@entry("derivatives", x=(2,), y=(3,))
def linearized():
    """The network's linearisation at a fixed place."""

    def f(params, x):
        value, push = linearize(partial(_mlp, params), torch.full_like(x, 0.3))
        return value + push(x)

    return f, _mlp_params(2, 3)


@entry("derivatives", x=(4,), y=(5,))
def energy_forces_and_stress():
    """Energy and forces of pairs of atoms by autograd.grad in a module, from distances."""

    def forward(m, x):
        x = x.detach().view(-1, 2, 2).requires_grad_()
        with torch.enable_grad():
            distance = (x[:, 0] - x[:, 1]).square().sum(-1, keepdim=True)
            energy = m.net(distance)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, -slope.flatten(1)], dim=-1)

    return Made(forward, net=nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 1)))


@entry("derivatives", x=(2,), y=(2,))
def hamiltonian():
    """A Hamiltonian network: the symplectic gradient of an energy, one Euler step of it."""

    def f(params, z):
        energy = lambda at: F.softplus(_mlp(params, at)).sum()  # noqa: E731
        q, p = grad(energy)(z).chunk(2, -1)
        return z + 0.1 * torch.cat([p, -q], -1)

    return f, _mlp_params(2, 1)
