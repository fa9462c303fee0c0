"""The recurrences of nn.RNN, nn.GRU and nn.LSTM over padded sequences, which see no padding.

    s_t = cell(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh, s_{t-1}) where step t is real, else s_{t-1}

So the last state is that of each sequence's own end; and backwards, every sequence begins at its
own end with the initial state. Only real steps are rows of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from fxkfac.graph.real import RealRows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

State = tuple[Tensor, ...]  # the hidden state; for an LSTM, the cell's state beside it
Cell = Callable[[Tensor, Tensor, State], State]


def _rnn(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda from_x, from_h, state: (activation(from_x + from_h),)


def _gru(from_x: Tensor, from_h: Tensor, state: State) -> State:
    (ri, zi, ni), (rh, zh, nh) = from_x.chunk(3, -1), from_h.chunk(3, -1)
    r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
    n = (ni + r * nh).tanh()
    return (n + z * (state[0] - n),)


def _lstm(from_x: Tensor, from_h: Tensor, state: State) -> State:
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


CELLS: dict[str, Cell] = {
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
    "gru": _gru,
    "lstm": _lstm,
}


def _fused_gru(
    from_x: Tensor, from_h: Tensor, h: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    (new,) = _gru(*_biased(from_x, from_h, biases), (h,))
    return new, from_x


def _fused_lstm(
    from_x: Tensor, from_h: Tensor, c: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    h, new = _lstm(*_biased(from_x, from_h, biases), (c, c))
    return h, new, from_x


def _biased(
    from_x: Tensor, from_h: Tensor, biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    b_ih, b_hh = biases or (None, None)
    return from_x if b_ih is None else from_x + b_ih, from_h if b_hh is None else from_h + b_hh


# A GPU runs a cell as one op, biases included. The last output is for the op's own backward pass.
FUSED: dict[OpOverload, Callable[..., tuple[Tensor, ...]]] = {
    torch.ops.aten._thnn_fused_gru_cell.default: _fused_gru,
    torch.ops.aten._thnn_fused_lstm_cell.default: _fused_lstm,
}


class Weights(NamedTuple):
    """The weights of one layer in one direction; `hr` projects the hidden state."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None


def weights_of(flat: Sequence[Tensor], directions: int, biased: bool) -> Iterator[Weights]:
    """The weights of all layers and directions, from the list of all in PyTorch's order."""
    each = len(flat) // directions
    for start in range(0, len(flat), each):
        ih, hh, *rest = flat[start : start + each]
        b_ih, b_hh = (rest.pop(0), rest.pop(0)) if biased else (None, None)
        yield Weights(ih, hh, b_ih, b_hh, rest[0] if rest else None)


def run(
    cell: Cell,
    x: Float[Tensor, "steps batch d_in"],
    real: Bool[Tensor, "steps batch"],
    initial: State,
    weights: Sequence[Weights],
    bidirectional: bool,
) -> tuple[Float[Tensor, "steps batch d_out"], State]:
    """All layers: the output, zero at the padding, and the last states, one for each direction."""
    ways = 2 if bidirectional else 1
    last: list[State] = []
    for layer in range(0, len(weights), ways):
        outputs = []
        for k in range(layer, layer + ways):
            state = tuple(s[k] for s in initial)
            y, state = _one_way(cell, x, real, state, weights[k], backwards=k > layer)
            outputs.append(y)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x, tuple(torch.stack(states) for states in zip(*last, strict=True))


def _one_way(
    cell: Cell, x: Tensor, real: Tensor, state: State, weights: Weights, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction."""
    from_x = _product(x.flatten(0, 1), weights.ih, weights.b_ih, real.flatten())
    steps = list(zip(from_x.view(*real.shape, -1).unbind(), real.unbind(), strict=True))
    outputs = []
    for from_step, is_real in reversed(steps) if backwards else steps:
        from_h = _product(state[0], weights.hh, weights.b_hh, is_real)
        new = cell(from_step, from_h, state)
        if weights.hr is not None:
            new = (_product(new[0], weights.hr, None, is_real), *new[1:])
        kept = is_real.unsqueeze(-1)
        state = tuple(torch.where(kept, a, b) for a, b in zip(new, state, strict=True))
        outputs.append(state[0])
    y = torch.stack(outputs[::-1] if backwards else outputs)
    return torch.where(real.unsqueeze(-1), y, 0.0), state


def _product(x: Tensor, W: Tensor, b: Tensor | None, real: Tensor) -> Tensor:
    """x Wᵀ + b, of whose rows these are real."""
    y: Tensor = RealRows.apply(F.linear(x, W, b), real)
    return y
