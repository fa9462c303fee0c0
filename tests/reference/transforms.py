"""Derived weights, derivatives inside of the model, and ensembles by vmap."""

from __future__ import annotations

import torch
from zoo import rand

from reference.case import of_the_zoo
from reference.images import conv_patches, conv_weight, image

# --- derived weights: the weight that is computed has the block ---


@of_the_zoo
def weight_norm(p, x, tape):
    g, v = (p[f"0.parametrizations.weight.original{k}"] for k in range(2))
    W = g * v / v.norm(dim=1, keepdim=True)
    return tape.linear("2", tape.layer("0.weight", x, W.T, p["0.bias"]).tanh())


@of_the_zoo
def standardised_conv(p, x, tape):
    w = p["w"]
    W = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    rows, places = conv_patches(x, W)
    return image(tape.layer("div(w)", rows, conv_weight(W), p["b"][None]), places).tanh()


@of_the_zoo
def lora_merged(p, x, tape):
    W = rand(3, 4) + p["B"] @ p["A"]
    return tape.layer("add(B, A)", x, W.T, p["b"]).tanh()


# --- derivatives: the streams are a shared axis ---


@of_the_zoo
def directional_derivative(p, x, tape):
    """Value and slope are two uses of each weight; no bias is added to the slope."""
    W, b, V, c = (p[f"{layer}.{name}"] for layer in ("first", "second") for name in "Wb")
    value = tape.layer("first.W", x, W.T, b).tanh()
    slope = (1 - value.square()) * tape.layer("first.W", torch.ones_like(x), W.T)
    return tape.layer("second.W", value, V.T, c) * tape.layer("second.W", slope, V.T)


@of_the_zoo
def force_by_func_grad(p, x, tape):
    """Backward, weights are used the other way round; the energy's own value is not used at all."""
    W, b, V = p["first.W"], p["first.b"], p["second.W"]
    tape.own("second.b")
    h = tape.layer("first.W", x, W.T, b).tanh()
    up = tape.layer("second.W", torch.ones(len(x), 1).double(), V)
    return -tape.layer("first.W", up * (1 - h.square()), W, term=1)


@of_the_zoo
def energy_and_forces(p, x, tape):
    W, V = p["net.0.weight"], p["net.2.weight"]
    h = tape.linear("net.0", x).tanh()
    up = tape.layer("net.2.weight", torch.ones(len(x), 1).double(), V, term=1)
    slope = tape.layer("net.0.weight", up * (1 - h.square()), W, term=1)
    return torch.cat([tape.linear("net.2", h), -slope], 1)


@of_the_zoo
def laplacian(p, x, tape):
    """Each stream that the prediction needs exists once: x and ∂ₖ below, the two ∂ₖ² above."""
    tape.own("second.b")  # no derivative sees it
    W, V = p["first.W"], p["second.W"]
    h = tape.layer("first.W", x, W.T, p["first.b"]).tanh()
    bend = -2 * h * (1 - h.square())
    slopes = [tape.layer("first.W", e.expand_as(x), W.T) for e in torch.eye(2).double()]
    return sum(tape.layer("second.W", bend * s.square(), V.T) for s in slopes)


@of_the_zoo
def poisson_by_forward_laplacian(p, x, tape):
    """The streams value, ∂₁, ∂₂, Δ are the shared axis; the biases are for the value alone."""
    W, V = p["first.W"], p["second.W"]
    tape.own("second.b")  # no gradient comes by the value
    unit = torch.eye(2).double().expand(len(x), 2, 2)
    streams = torch.cat([x[:, None], unit, torch.zeros_like(x)[:, None]], 1)
    y = tape.layer("first.W", streams, W.T)
    h = (y[:, 0] + tape.own("first.b")).tanh()
    slope, bend = 1 - h.square(), -2 * h * (1 - h.square())
    squares = y[:, 1:3].square().sum(1)
    streams = torch.stack(
        [h, slope * y[:, 1], slope * y[:, 2], slope * y[:, 3] + bend * squares], 1
    )
    return tape.layer("second.W", streams, V.T)[:, 3]


# --- an ensemble ---


@of_the_zoo
def ensemble(p, x, tape):
    """Every member is a group; all of them see the same data."""
    y = tape.layer("W", x.expand(2, *x.shape)[:, :, None], p["W"].mT, p["b"])
    return y[:, :, 0].transpose(0, 1).tanh()
