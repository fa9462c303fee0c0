"""Tables: embeddings, positions, tokens between the data, bags, and padded sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Made, ints

from reference.case import CE, N, case, of_the_zoo
from reference.tape import Tape


def lookup(tape: Tape, name: str, indices: Tensor) -> Tensor:
    """The rows of a table: a layer on one-hot vectors."""
    table = tape.params[name]
    return tape.layer(name, F.one_hot(indices, len(table)).double(), table)


@case(
    lambda: Made(lambda m, i: m.b(m.a(i).tanh().mean(1)), a=nn.Embedding(6, 4), b=nn.Linear(4, 3)),
    lambda: ints(N, 5, high=6),
    CE,
)
def embedding(p, i, tape):
    return tape.linear("b", lookup(tape, "a.weight", i).tanh().mean(1))


@case(
    lambda: Made(
        lambda m, i: (m.embed(i).cumsum(1).tanh() @ m.embed.weight.T).mT, embed=nn.Embedding(5, 3)
    ),
    lambda: ints(N, 4, high=5),
    CE,
)
def tied_embedding(p, i, tape):
    h = lookup(tape, "embed.weight", i).cumsum(1).tanh()
    return tape.layer("embed.weight", h, p["embed.weight"].T, term=1).mT


@of_the_zoo
def embedding_tied(p, i, tape):
    h = lookup(tape, "embed.weight", i) + tape.own("pos")
    h = h + tape.linear("body", h.cumsum(1)).tanh()
    return tape.layer("embed.weight", h, p["embed.weight"].T, term=1).mT


@of_the_zoo
def embedding_tied_linear(p, i, tape):
    """The head's bias is a column of the head's term alone."""
    h = lookup(tape, "embed.weight", i).cumsum(1).tanh()
    return tape.layer("embed.weight", h, p["embed.weight"].T, p["head.bias"], term=1).mT


@of_the_zoo
def embedding_padding(p, i, tape):
    """The padding index stays as it is: a row of zeros in the place of its one-hot vector."""
    table = p["embed.weight"]
    hot = F.one_hot(i, 6).double()
    seen = torch.cat([torch.zeros_like(hot[..., :1]), hot[..., 1:]], -1)
    h = tape.layer("embed.weight", seen, table) + hot[..., :1] * table[0].detach()
    return tape.linear("head", h.sum(1).tanh())


@of_the_zoo
def learned_positions(p, i, tape):
    places = torch.arange(4).expand(N, 4)
    h = lookup(tape, "tokens.weight", i) + lookup(tape, "places.weight", places)
    return tape.linear("head", h.tanh().mean(1))


@of_the_zoo
def positions_without_data(p, i, tape):
    places = torch.arange(4).expand(N, 4)
    return (lookup(tape, "tokens.weight", i) + lookup(tape, "places.weight", places)).tanh().mean(1)


@of_the_zoo
def relative_positions(p, x, tape):
    """Every pair of places is a row of the table's; all data have the same."""
    q, k, v = tape.linear("qkv", x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    pairs = (torch.arange(3)[:, None] - torch.arange(3) + 2).flatten()
    offsets = lookup(tape, "table", pairs.expand(N, 9)).unflatten(1, (3, 3))
    h = (q @ k.mT + offsets.permute(0, 3, 1, 2)).softmax(-1) @ v
    return h.transpose(1, 2).flatten(2)


@of_the_zoo
def indexed_columns(p, i, tape):
    hot = F.one_hot(i, 6).double()
    return tape.layer("W", hot, p["W"].T).mT.tanh()


@of_the_zoo
def embedding_bag_mean(p, i, tape):
    return lookup(tape, "0.weight", i).mean(1).tanh()


@of_the_zoo
def embedding_bag_sum(p, i, tape):
    return tape.linear("2", lookup(tape, "0.weight", i).sum(1).tanh())


@of_the_zoo
def embedding_bag_weighted(p, inputs, tape):
    """The weights belong to what is done with the rows, not to the table's input."""
    i, w = inputs
    return (w[..., None] * lookup(tape, "bag.weight", i)).sum(1).tanh()


# --- tokens ---


def _block(tape: Tape, x: Tensor) -> Tensor:
    mixed = x + (x @ x.mT).softmax(-1) @ tape.linear("value", x)
    return tape.linear("head", mixed).tanh()


@of_the_zoo
def class_token(p, x, tape):
    return _block(tape, torch.cat([tape.own("token")[:, 0], x], 1))[:, 0]


@of_the_zoo
def register_tokens(p, x, tape):
    return _block(tape, torch.cat([x, tape.own("registers")], 1))[:, :-2]


@of_the_zoo
def positions_and_class_token(p, x, tape):
    x = torch.cat([tape.own("token")[:, 0], x], 1) + tape.own("positions")[:, 0]
    return _block(tape, x).mean(1)


@of_the_zoo
def mask_token(p, inputs, tape):
    x, mask = inputs
    return _block(tape, torch.where(mask[..., None], tape.own("token")[:, None], x))


# --- padding ---

REAL = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()


class Tagger(nn.Module):
    """Every position by itself: tokens in, classes out, the classes on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.hidden(self.table(tokens)).tanh().cumsum(1)
        return self.head(h).movedim(-1, 1)


@case(Tagger, lambda: ints(N, 5, high=7), CE, kfac={"mask": lambda x, y: REAL})
def padded(p, i, tape):
    """A datum has no real position at all; padded ones reach later ones by the sum."""
    hot = F.one_hot(i, 7).double()
    h = tape.layer("table.weight", hot, p["table.weight"], real=REAL)
    h = tape.layer("hidden.weight", h, p["hidden.weight"].T, p["hidden.bias"], real=REAL)
    h = h.tanh().cumsum(1)
    return tape.layer("head.weight", h, p["head.weight"].T, p["head.bias"], real=REAL).mT
