"""Scales and shifts: norms, slopes, gains. Each has its exact diagonal, each shift its block."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from reference.case import of_the_zoo
from reference.images import conv


def over_channels(p: torch.Tensor) -> torch.Tensor:
    """(n, c) -> (n, c, 1, 1), as it stands beside an image."""
    return p[:, :, None, None]


@of_the_zoo
def layer_norm_affine(p, x, tape):
    h = F.layer_norm(tape.linear("body", x), (5,))
    h = h * tape.own("norm.weight")[:, None] + tape.own("norm.bias")[:, None]
    return tape.linear("head", h.tanh()).mean(1)


@of_the_zoo
def layer_norm_of_two_axes(p, x, tape):
    h = F.layer_norm(tape.linear("0", x), (3, 4))
    return (h * tape.own("1.weight") + tape.own("1.bias")).tanh()


@of_the_zoo
def rms_norm_by_hand(p, x, tape):
    h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return tape.linear("head", tape.own("w")[:, None] * h).sum(1)


@of_the_zoo
def group_norm(p, x, tape):
    h = F.group_norm(conv(tape, "0", x), 2)
    return (h * over_channels(tape.own("1.weight")) + over_channels(tape.own("1.bias"))).tanh()


@of_the_zoo
def layer_scale(p, x, tape):
    return x + tape.own("gamma")[:, None] * tape.linear("body", x).tanh()


@of_the_zoo
def gain_of_one_plus(p, x, tape):
    return (1 + tape.own("w"))[:, None] * tape.linear("body", x)


@of_the_zoo
def rezero(p, x, tape):
    """Both uses of the number count in one gradient."""
    α = tape.own("alpha")[:, None]
    x = x + α * tape.linear("first", x).tanh()
    return x + α * tape.linear("second", x).tanh()


@of_the_zoo
def prelu_per_channel(p, x, tape):
    y = conv(tape, "0", x)
    return torch.where(y > 0, y, tape.own("1.weight")[:, :, None] * y)


@of_the_zoo
def prelu_single(p, x, tape):
    y = tape.linear("0", x)
    return tape.linear("2", torch.where(y > 0, y, tape.own("1.weight") * y))


@of_the_zoo
def scaled_and_shifted(p, x, tape):
    """Not a scale, since it is also added: the exact block, not its diagonal."""
    w = tape.own("w")
    return w * x.tanh() + w


@of_the_zoo
def learned_temperature(p, x, tape):
    return (tape.own("beta") * tape.linear("head", x)).softmax(-1)
