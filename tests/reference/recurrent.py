"""Recurrent nets, unrolled by hand: every step is one more use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo import Made, rand

from reference.case import CE, MSE, N, case, of_the_zoo
from reference.tape import Tape


def _recurrent(m, x):
    h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(m.a(step) + m.b(h))
    return h


@case(
    lambda: Made(_recurrent, a=nn.Linear(3, 4), b=nn.Linear(4, 4, bias=False)),
    lambda: rand(N, 5, 3),
    MSE,
)
def recurrent(p, x, tape):
    h = torch.zeros(N, 4).double()
    for step in x.unbind(1):
        h = torch.tanh(tape.linear("a", step) + tape.linear("b", h))
    return h


def product(tape: Tape, kind: str, x: Tensor) -> Tensor:
    """x W.T + b for a recurrent module's weight and bias, `kind` such as `rnn.*_ih_l0`."""
    weight, bias = kind.replace("*", "weight"), kind.replace("*", "bias")
    return tape.layer(weight, x, tape.params[weight].T, tape.params[bias])


@of_the_zoo
def rnn_module(p, x, tape):
    for layer in range(2):
        h, states = torch.zeros(N, 4).double(), []
        for step in x.unbind(1):
            own = product(tape, f"rnn.*_ih_l{layer}", step)
            h = torch.tanh(own + product(tape, f"rnn.*_hh_l{layer}", h))
            states.append(h)
        x = torch.stack(states, 1)
    return x[:, -1]


def gru_step(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """The next state, from the products with the input and with the state."""
    (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, -1), gh.chunk(3, -1)
    r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
    return (1 - z) * (ni + r * nh).tanh() + z * h


@of_the_zoo
def gru_cell(p, inputs, tape):
    x, h = inputs
    return gru_step(product(tape, "*_ih", x), product(tape, "*_hh", h), h)


@of_the_zoo
def rnn_cell(p, x, tape):
    h = torch.zeros(N, 4).double()
    for step in x.unbind(1):
        h = torch.tanh(product(tape, "cell.*_ih", step) + product(tape, "cell.*_hh", h))
    return h


@case(
    lambda: Made(
        lambda m, x: m.head(m.gru(x)[0][:, -1]), gru=nn.GRU(3, 4, batch_first=True),
        head=nn.Linear(4, 2),
    ),
    lambda: rand(N, 4, 3),
    CE,
)  # fmt: skip
def gru(p, x, tape):
    h = torch.zeros(N, 4).double()
    for step in x.unbind(1):
        h = gru_step(product(tape, "gru.*_ih_l0", step), product(tape, "gru.*_hh_l0", h), h)
    return tape.linear("head", h)


class Gated(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next state and cell, from the sum of both products (4, n, d)."""
    i, f, g, o = gates
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@case(Gated, lambda: rand(N, 4, 4), MSE)
def lstm(p, x, tape):
    h, c = torch.zeros(2, N, 3).double()
    for step in x.unbind(1):
        gates = product(tape, "lstm.*_ih_l0", step) + product(tape, "lstm.*_hh_l0", h)
        h, c = lstm_step(gates.unflatten(1, (4, 3)).transpose(0, 1), c)
    return tape.linear("head", h)


@case(Gated, lambda: rand(N, 4, 4), MSE, apart={"lstm.weight*": 4})
def lstm_gates_apart(p, x, tape):
    """Each gate has a B of its own; they share A, as groups that see the same input."""

    def gates(kind: str, at: Tensor) -> Tensor:
        W, b = (p[f"lstm.{what}_{kind}_l0"].unflatten(0, (4, 3)) for what in ("weight", "bias"))
        rows = at.expand(4, 1, N, -1).transpose(1, 2)  # (gate, n, 1, i)
        return tape.layer(f"lstm.weight_{kind}_l0", rows, W.mT, b)[:, :, 0]

    h, c = torch.zeros(2, N, 3).double()
    for step in x.unbind(1):
        h, c = lstm_step(gates("ih", step) + gates("hh", h), c)
    return tape.linear("head", h)


def _equilibrium(m, x):
    z, drive = torch.zeros(len(x), 4, dtype=x.dtype), m.drive(x)
    for _ in range(6):
        z = torch.tanh(m.state(z) + drive)
    return m.head(z)


@case(
    lambda: Made(
        _equilibrium, state=nn.Linear(4, 4), drive=nn.Linear(3, 4, bias=False), head=nn.Linear(4, 2)
    ),
    lambda: rand(N, 3),
    MSE,
)
def deep_equilibrium(p, x, tape):
    """Six steps towards the fixed point: the data drive all, the weight is used in each."""
    z, drive = torch.zeros(N, 4).double(), tape.linear("drive", x)
    for _ in range(6):
        z = torch.tanh(tape.linear("state", z) + drive)
    return tape.linear("head", z)
