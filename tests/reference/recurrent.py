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


def product(tape: Tape, kind: str, x: Tensor, real: Tensor | None = None) -> Tensor:
    """x W.T + b for a recurrent module's weight and bias, `kind` such as `rnn.*_ih_l0`."""
    weight, bias = kind.replace("*", "weight"), kind.replace("*", "bias")
    return tape.layer(weight, x, tape.params[weight].T, tape.params.get(bias), real=real)


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


def own_product(tape: Tape, kind: str, x: Tensor, n: int) -> Tensor:
    """The same for one row of datum n alone."""
    is_own = (torch.arange(N) == n)[:, None]
    return product(tape, kind, is_own * x, real=is_own)[n : n + 1]


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


def packed_steps(tape, end, x, n, state, backwards=False):
    """The states of one sequence alone, of the LSTM whose parameters end in `end`."""
    states = []
    for step in x.flip(0) if backwards else x:
        h, c = state
        gates = own_product(tape, f"rnn.*_ih_{end}", step[None], n)
        gates = gates + own_product(tape, f"rnn.*_hh_{end}", h, n)
        h, c = lstm_step(gates.unflatten(1, (4, -1)).transpose(0, 1), c)
        if f"rnn.weight_hr_{end}" in tape.params:
            h = own_product(tape, f"rnn.*_hr_{end}", h, n)
        state = h, c
        states.append(h)
    return torch.cat(states[::-1] if backwards else states), state


@of_the_zoo
def packed_lstm(p, inputs, tape):
    """Every sequence is run alone, to its own end."""
    last = []
    for n, (x, length) in enumerate(zip(*inputs, strict=True)):
        zero = torch.zeros(2, 1, 4).double()
        last.append(packed_steps(tape, "l0", x[:length], n, tuple(zero))[1][0])
    return tape.linear("head", torch.cat(last))


@of_the_zoo
def packed_gru(p, inputs, tape):
    """Forwards and backwards over each sequence alone; the head sees the padding, too."""
    outputs = []
    for n, (x, length) in enumerate(zip(*inputs, strict=True)):
        ways = []
        for end, steps in (("l0", x[:length]), ("l0_reverse", x[:length].flip(0))):
            h, states = torch.zeros(1, 2).double(), []
            for step in steps:
                from_x = own_product(tape, f"rnn.*_ih_{end}", step[None], n)
                h = gru_step(from_x, own_product(tape, f"rnn.*_hh_{end}", h, n), h)
                states.append(h)
            ways.append(torch.cat(states if end == "l0" else states[::-1]))
        outputs.append(nn.functional.pad(torch.cat(ways, 1), (0, 0, 0, 4 - length)))
    return tape.linear("head", torch.stack(outputs))


@of_the_zoo
def packed_projected(p, inputs, tape):
    """Two layers, each forwards and backwards over each sequence alone."""
    predictions = []
    x, lengths, h, c = inputs
    for n, length in enumerate(lengths):
        y = x[:length, n]
        for layer in range(2):
            ways = []
            for k, end in enumerate((f"l{layer}", f"l{layer}_reverse")):
                state = h[2 * layer + k, n, None], c[2 * layer + k, n, None]
                ways.append(packed_steps(tape, end, y, n, state, backwards=k == 1))
            y = torch.cat([states for states, _ in ways], 1)
        predictions.append(y.sum(0)[:2] + ways[1][1][0][0])
    return torch.stack(predictions)


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
