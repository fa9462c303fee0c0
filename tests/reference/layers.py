"""Layers one after the other: called twice, tied, in branches, with the data on any axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo import Made, rand

from reference.case import CE, CE_SUM, MSE, MSE_SUM, N, case, of_the_zoo
from reference.tape import with_columns


@case(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: rand(N, 4), CE)
def mlp(p, x, tape):
    return tape.linear("2", tape.linear("0", x).tanh())


@case(
    lambda: Made(
        lambda m, x: torch.einsum("od,nd->no", m.V, (x @ m.W + m.b).tanh()),
        W=(4, 5), b=(5,), V=(3, 5),
    ),
    lambda: rand(N, 4),
    MSE,
)  # fmt: skip
def unfused(p, x, tape):
    h = tape.layer("W", x, p["W"], p["b"]).tanh()
    return tape.layer("V", h, p["V"].T)


@case(
    lambda: Made(
        lambda m, x: m.a(x.reshape(-1, 4)).tanh().view(-1, 5, 3).transpose(1, 2), a=nn.Linear(4, 3)
    ),
    lambda: rand(N, 5, 4),
    CE_SUM,
)
def flattened_rows(p, x, tape):
    return tape.linear("a", x).tanh().mT


@case(
    lambda: Made(lambda m, x: m.b(m.a(x).tanh().mean(0)), a=nn.Linear(4, 3), b=nn.Linear(3, 2)),
    lambda: rand(5, N, 4),
    MSE,
    batch_axis=1,
)
def time_major(p, x, tape):
    return tape.linear("b", tape.linear("a", x.transpose(0, 1)).tanh().mean(1))


@case(
    lambda: Made(lambda m, x: m.V @ torch.tanh(m.W @ x + m.b[:, None]), W=(5, 4), b=(5,), V=(3, 5)),
    lambda: rand(4, N),
    MSE_SUM,
    prediction_axis=1,
    batch_axis=1,
)
def data_in_columns(p, x, tape):
    h = tape.layer("W", x.T, p["W"].T, p["b"]).tanh()
    return tape.layer("V", h, p["V"].T)


@case(
    lambda: Made(lambda m, x: m.b(m.a(m.a(x).tanh()).sin()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
    lambda: rand(N, 4),
    CE,
)
def called_twice(p, x, tape):
    return tape.linear("b", tape.linear("a", tape.linear("a", x).tanh()).sin())


@case(
    lambda: Made(lambda m, x: m.a(x).tanh().mean(1) + m.a(x[:, 0]).sin(), a=nn.Linear(4, 3)),
    lambda: rand(N, 5, 4),
    MSE,
)
def different_ranks(p, x, tape):
    return tape.linear("a", x).tanh().mean(1) + tape.linear("a", x[:, 0]).sin()


@of_the_zoo
def subclass(p, x, tape):
    return tape.linear("fc2", F.gelu(tape.linear("fc1", x)))


@of_the_zoo
def module_list(p, x, tape):
    h = tape.linear("layers.1", tape.linear("layers.0", x).sin())
    return tape.linear("layers.2", h.sin())


@of_the_zoo
def number_input(p, inputs, tape):
    x, steps = inputs
    for _ in range(steps):
        x = x + tape.linear("step", x).tanh()
    return tape.linear("head", x)


@of_the_zoo
def siamese(p, pair, tape):
    a, b = (tape.linear("tower.0", x).tanh() for x in pair.unbind(1))
    return tape.linear("score", (a - b).square())


@of_the_zoo
def branches(p, x, tape):
    a, b, c = (tape.linear(name, x) for name in "abc")
    return tape.linear("head", torch.cat([a * b.sigmoid(), c], 1)) + tape.linear("skip", x)


@of_the_zoo
def tied_autoencoder(p, x, tape):
    """The encoder is stored as (out, in); the decoder is its transpose."""
    W = p["decode"]
    h = tape.layer("decode", x, W.T, p["encode.bias"]).tanh()
    return tape.layer("decode", h, W, p["bias"], term=1)


@of_the_zoo
def tied_modules(p, x, tape):
    """One weight with a bias for each use: a column of x̃ for either, zero at the other's use."""
    W = torch.cat([p["0.weight"].T, p["0.bias"][None], p["2.bias"][None]])
    h = tape.layer("0.weight", with_columns(x, 1.0, 0.0), W).tanh()
    return tape.layer("0.weight", with_columns(h, 0.0, 1.0), W)


@of_the_zoo
def biases_only(p, x, tape):
    h = (x @ p["0.weight"].T + tape.own("0.bias")).tanh()
    return h @ p["2.weight"].T + tape.own("2.bias")


@of_the_zoo
def bias_from_the_left(p, x, tape):
    """b − x W, and a bias that is added twice over."""
    W, V = torch.cat([p["W"], p["b"][None]]), torch.cat([p["V"], p["c"][None]])
    h = tape.layer("W", with_columns(-x, 1.0), W).tanh()
    return tape.layer("V", with_columns(h, 2.0), V)


@of_the_zoo
def addmm_scaled(p, x, tape):
    W = torch.cat([p["W"], p["b"][None]])
    return tape.layer("W", with_columns(0.7 * x, -1.3), W).tanh()


@of_the_zoo
def detached_part(p, x, tape):
    """Both calls have the same input, and are one use."""
    y = tape.linear("a", x)
    return tape.linear("b", y.tanh()) * y.detach().sin()


@of_the_zoo
def bias_added_twice(p, x, tape):
    h = tape.layer("W", x, p["W"]) + tape.own("b")
    return tape.layer("V", h.tanh(), p["V"]) + tape.own("b")
