"""Attention, by itself and across, and the transformer's layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Made, rand

from reference.case import CE, MSE_SUM, N, case, of_the_zoo
from reference.tape import Params, Tape

HEADS = 2
Norm = Callable[[str, Tensor], Tensor]  # (name, h) -> h normalised


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in each of the heads: (n, t, d) -> (n, t, d)."""
    q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    h = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return h.transpose(1, 2).flatten(2)


def self_attention(tape: Tape, name: str, x: Tensor) -> Tensor:
    """nn.MultiheadAttention of a sequence with itself: one product for q, k and v."""
    W, b = tape.params[f"{name}.in_proj_weight"], tape.params[f"{name}.in_proj_bias"]
    qkv = tape.layer(f"{name}.in_proj_weight", x, W.T, b)
    return tape.linear(f"{name}.out_proj", heads(*qkv.chunk(3, 2)))


@case(
    lambda: Made(lambda m, x: m.attend(x, x, x)[0].mean(0), attend=nn.MultiheadAttention(4, 2)),
    lambda: rand(5, N, 4),
    CE,
    batch_axis=1,
)
def attention_time_first(p, x, tape):
    return self_attention(tape, "attend", x.transpose(0, 1)).mean(1)


@case(
    lambda: Made(
        lambda m, x: m.attend(x, x, x, need_weights=False)[0],
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    lambda: rand(N, 3, 4),
    MSE_SUM,
)
def attention_batch_first(p, x, tape):
    return self_attention(tape, "attend", x)


@of_the_zoo
def attention_weights(p, x, tape):
    return tape.linear("head", self_attention(tape, "attend", x).mean(1))


@of_the_zoo
def cross_attention(p, inputs, tape):
    """Two parts of the packed weight: the queries', and one for keys and values."""
    x, z = inputs
    name, (W, b) = "attend.in_proj_weight", (p["attend.in_proj_weight"], p["attend.in_proj_bias"])
    q = tape.layer(name, x, W[:4].T, b[:4])
    k, v = tape.layer(name, z, W[4:].T, b[4:], term=1).chunk(2, 2)
    return tape.linear("attend.out_proj", heads(q, k, v))


@of_the_zoo
def cross_attention_separate(p, inputs, tape):
    def project(part: str, x: Tensor) -> Tensor:
        name = f"attend.{part}_proj_weight"
        return tape.layer(name, x, p[name].T)

    x, z = inputs
    return tape.linear("attend.out_proj", heads(project("q", x), project("k", z), project("v", z)))


@of_the_zoo
def attention_by_hand(p, x, tape):
    """Both heads have the same keys and values; no position sees what comes after it."""
    q, k, v = (tape.linear(name, x) for name in "qkv")
    q = q.unflatten(2, (2, 2)).transpose(1, 2)
    scores = (q @ k[:, None].mT / 2**0.5).exp().tril()
    h = scores / scores.sum(-1, keepdim=True) @ v[:, None]
    return tape.linear("out", h.transpose(1, 2).flatten(2))


def transformer(tape: Tape, x: Tensor, norm: Norm) -> Tensor:
    """Attention and a feed-forward net, each with the norm of its sum behind."""
    x = norm("norm1", x + self_attention(tape, "self_attn", x))
    return norm("norm2", x + tape.linear("linear2", tape.linear("linear1", x).relu()))


def frozen(p: Params) -> Norm:
    """Layer norms that are not trained."""
    return lambda name, h: F.layer_norm(h, (4,), p[f"{name}.weight"], p[f"{name}.bias"])


def trained(tape: Tape) -> Norm:
    """Layer norms whose scales and shifts have blocks, over a sequence."""

    def norm(name: str, h: Tensor) -> Tensor:
        scale, shift = tape.own(f"{name}.weight"), tape.own(f"{name}.bias")
        return F.layer_norm(h, (4,)) * scale[:, None] + shift[:, None]

    return norm


@of_the_zoo
def transformer_train(p, x, tape):
    return transformer(tape, x, frozen(p))


@of_the_zoo
def transformer_eval(p, x, tape):
    return transformer(tape, x, frozen(p))


@case(
    lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
    lambda: rand(N, 3, 4),
    MSE_SUM,
)
def transformer_with_norms(p, x, tape):
    return transformer(tape, x, trained(tape))
