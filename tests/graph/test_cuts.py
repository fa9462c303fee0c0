"""Gradients of the model's own: kept on data that are unlike the example, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import rand
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fxkfac
from fxkfac.errors import CaptureError

LOSS = nn.MSELoss()


def scale(h: Tensor) -> Tensor:
    """One number for all small data, so that its slope does not show on them."""
    return h.abs().amax(1, keepdim=True).clamp(min=4.0)


class Clamped(torch.autograd.Function):
    """A clamp that gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-6, 6)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def no_grad(m: nn.Module, h: Tensor) -> Tensor:
    with torch.no_grad():
        c = scale(h)
    return h / c


def decorated(m: nn.Module, h: Tensor) -> Tensor:
    return h / torch.no_grad()(scale)(h)


def switched(m: nn.Module, h: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    c = scale(h)
    torch.set_grad_enabled(True)
    return h / c


def inference(m: nn.Module, h: Tensor) -> Tensor:
    with torch.inference_mode():
        c = scale(h)
    return h / c.clone()


def kept_in_a_buffer(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.held.copy_(scale(h).mean(0))
    return h / m.held


def hooked(change: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(m: nn.Module, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(change)
        return 3 * h

    return forward


CUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no_grad": no_grad,
    "no_grad as a decorator": decorated,
    "set_grad_enabled": switched,
    "inference_mode": inference,
    "into a buffer": kept_in_a_buffer,
    "data": lambda m, h: h / scale(h.data),
    "detach": lambda m, h: h / scale(h).detach(),
    "a Function": lambda m, h: 3 * Clamped.apply(h),
    "a hook that looks": hooked(lambda g: None),
}
REFUSED = {
    "detach_": (lambda m, h: h / scale(h.clone().detach_()), r"detached in place at .*test_cuts"),
    "a hook that changes": (hooked(lambda g: g.clamp(-5, 5)), "a hook of a tensor at .*test_cuts"),
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 3), function
        self.register_buffer("held", torch.ones(1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


@pytest.mark.parametrize("cut", CUTS)
def test_gradients_on_data_unlike_the_example(cut: str) -> None:
    model, x, y = Net(CUTS[cut]), rand(6, 4), rand(6, 3, seed=1)
    program, large = fxkfac.trace(model, x), 20 * x
    found = fxkfac.step(program, LOSS, (large, y)).gradients
    named = dict(model.named_parameters())
    expected = torch.autograd.grad(LOSS(model(large), y), list(named.values()))
    for name, g in zip(named, expected, strict=True):
        torch.testing.assert_close(found[name], g)
    one = fxkfac.kfac(program, LOSS, (large[:1], y[:1])).dense("layer.weight")
    torch.testing.assert_close(
        one, fxkfac.exact.ggn(model, LOSS, (large[:1], y[:1]), "layer.weight")
    )


@pytest.mark.parametrize("cut", REFUSED)
def test_what_no_graph_keeps_is_refused(cut: str) -> None:
    function, message = REFUSED[cut]
    with pytest.raises(CaptureError, match=message):
        fxkfac.trace(Net(function), rand(6, 4))


@pytest.mark.parametrize("structure", ["derived", "dense"])
def test_a_power_iteration_without_gradients(structure: str) -> None:
    """Where it has converged its slope is zero, and nowhere else."""
    torch.manual_seed(0)
    model, x, y = spectral_norm(nn.Linear(4, 3)).double(), rand(5, 4), rand(5, 3, seed=1)
    name, parametrization = "parametrizations.weight.original", model.parametrizations.weight
    program = fxkfac.trace(model, x, structure={name: structure})
    parametrization.original.data += 0.3 * rand(3, 4, seed=2)
    before = {key: b.clone() for key, b in model.named_buffers()}
    (expected,) = torch.autograd.grad(LOSS(model(x), y), parametrization.original)
    for key, b in model.named_buffers():
        b.copy_(before[key])
    torch.testing.assert_close(fxkfac.step(program, LOSS, (x, y)).gradients[name], expected)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_modules_may_look_but_not_change(kind: str) -> None:
    def hooked_net(hook: Callable[..., Any]) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
        getattr(model[1], f"register_{kind}")(hook)
        return model

    heard: list[Any] = []
    fxkfac.trace(hooked_net(lambda *gradients: heard.append(gradients)), rand(6, 4))
    assert heard
    clips = hooked_net(lambda m, g, *_: tuple(t.clamp(-9, 9) for t in g))
    before = [dict(held) for held in (clips[1]._backward_hooks, clips[1]._backward_pre_hooks)]
    with pytest.raises(CaptureError, match="a hook of the module '1'"):
        fxkfac.trace(clips, rand(6, 4))
    assert [clips[1]._backward_hooks, clips[1]._backward_pre_hooks] == before
