"""Matrix products in every order: stacks, experts, heads, low rank, from the left, in parts."""

from __future__ import annotations

import torch
from torch import nn
from zoo import Made, rand

from reference.case import CE, MSE, N, case, of_the_zoo

# --- a weight of three axes: heads are outputs, experts are groups ---


@case(
    lambda: Made(
        lambda m, x: torch.einsum("bsi,hid->bhsd", x, m.W).sin().sum(2).flatten(1), W=(2, 4, 3)
    ),
    lambda: rand(N, 5, 4),
    CE,
)
def einsum_heads(p, x, tape):
    y = tape.layer("W", x, p["W"].permute(1, 0, 2).flatten(1))
    return y.sin().sum(1)


@case(
    lambda: Made(
        lambda m, x: torch.baddbmm(m.b[:, None], x.permute(2, 0, 1, 3).flatten(1, 2), m.W)
        .tanh()
        .view(2, -1, 5, 3)
        .mean((0, 2)),
        W=(2, 4, 3), b=(2, 3),
    ),
    lambda: rand(N, 5, 2, 4),
    MSE,
)  # fmt: skip
def experts(p, x, tape):
    return tape.layer("W", x.permute(2, 0, 1, 3), p["W"], p["b"]).tanh().mean((0, 2))


@of_the_zoo
def bmm_experts(p, x, tape):
    tokens = x.expand(2, -1, -1, -1)
    return tape.layer("W", tokens, p["W"]).tanh().transpose(0, 1)


@of_the_zoo
def matmul_stack(p, x, tape):
    """Every matrix of the stack is a group; all of them see the same data."""
    y = tape.layer("W", x.expand(2, *x.shape), p["W"], p["b"].squeeze(1))
    return y.transpose(0, 1).tanh()


@of_the_zoo
def einsum_groups(p, x, tape):
    """The places have weights of their own, so that none is shared; nor is the bias."""
    y = tape.layer("W", x.transpose(0, 1)[:, :, None], p["W"])[:, :, 0]
    return y.transpose(0, 1).tanh() + tape.own("b")


@of_the_zoo
def stacked(p, x, tape):
    """Two parameters are one operand, its two groups."""
    W = torch.stack([p["W"], p["V"]])
    y = tape.layer("W", x.transpose(0, 1)[:, :, None], W)[:, :, 0]
    return y.transpose(0, 1).tanh()


@of_the_zoo
def soft_mixture(p, x, tape):
    own = tape.layer("W", x.expand(2, 1, -1, -1).transpose(1, 2), p["W"], p["b"])[:, :, 0]
    gate = tape.linear("gate", x).softmax(-1)
    return torch.einsum("eno,ne->no", own.tanh(), gate)


@of_the_zoo
def addbmm(p, x, tape):
    """The sum over the experts makes them inputs."""
    return tape.layer("W", x.flatten(1), p["W"].flatten(0, 1), p["b"]).tanh()


@of_the_zoo
def switched(p, x, tape):
    gate = tape.linear("gate", x).softmax(-1)
    kept = gate * (gate == gate.amax(-1, keepdim=True))
    return sum(kept[..., [k]] * tape.linear(f"experts.{k}", x).tanh() for k in range(2))


@of_the_zoo
def capacity_routed(p, x, tape):
    """The rows of an expert are the two tokens of each datum that it takes."""
    weights, chosen = tape.linear("gate", x).softmax(-1).topk(2, dim=1)  # (n, capacity, expert)
    y = torch.zeros(N, 5, 3).double()
    for k in range(2):
        hot = nn.functional.one_hot(chosen[..., k], 5).double()  # (n, capacity, token)
        own = tape.layer("W", hot @ x, p["W"][k], term=k).tanh()
        y = y + hot.mT @ (own * weights[..., [k]])
    return y


# --- low rank, two inputs, both orientations ---


@of_the_zoo
def lora(p, x, tape):
    return (x @ p["W"] + tape.layer("B", tape.layer("A", x, p["A"]), p["B"])).tanh()


@of_the_zoo
def lora_trained(p, x, tape):
    low = tape.layer("B", tape.layer("A", x, p["A"]), p["B"])
    return (low + tape.layer("W", x, p["W"])).tanh()


@of_the_zoo
def bilinear(p, inputs, tape):
    x, z = inputs
    outer = (x[:, :, None] * z[:, None]).flatten(1)
    return tape.layer("weight", outer, p["weight"].flatten(1).T, p["bias"])


@of_the_zoo
def einsum_with_two_inputs(p, inputs, tape):
    x, z = inputs
    outer = (x[:, :, None] * z[:, None]).flatten(1)
    return tape.layer("W", outer, p["W"].flatten(1).T).tanh()


@of_the_zoo
def there_and_back(p, x, tape):
    h = tape.layer("W", x, p["W"]).tanh()
    return tape.layer("W", h, p["W"].T, term=1)


@of_the_zoo
def outer_product(p, x, tape):
    """One number for each datum: one input."""
    return tape.layer("w", x[:, None], p["w"][None], p["b"]).cos()


# --- from the left ---


@of_the_zoo
def from_the_left(p, x, tape):
    h = tape.layer("W", x, p["W"].T, p["b"]).tanh()
    return tape.layer("V", h, p["V"].T)


@of_the_zoo
def from_the_left_stack(p, x, tape):
    return tape.layer("W", x.mT, p["W"].T, p["b"]).mT


@of_the_zoo
def over_tokens(p, x, tape):
    """The mixer's first layer has the channels for its shared axis."""
    x = x + tape.linear("tokens", x.mT).tanh().mT
    return tape.linear("channels", x).mean(1)


@of_the_zoo
def learned_queries(p, x, tape):
    scores = tape.layer("queries", x, p["queries"].T).mT
    return scores.softmax(-1) @ x


@case(
    lambda: Made(
        lambda m, a, x: m.b(a @ m.a(a @ x).relu()).mean(1), a=nn.Linear(4, 5), b=nn.Linear(5, 2)
    ),
    lambda: (rand(N, 6, 6, seed=3).softmax(-1), rand(N, 6, 4)),
    CE,
)
def graph_convolution(p, inputs, tape):
    """The nodes share the weights; those of every datum are mixed by an adjacency of its own."""
    a, x = inputs
    return tape.linear("b", a @ tape.linear("a", a @ x).relu()).mean(1)


# --- parts of one parameter ---


@of_the_zoo
def sliced_qkv(p, x, tape):
    parts = zip(p["W"].split(2), p["b"].split(2), strict=True)
    q, k, v = (tape.layer("W", x, W.T, b, term) for term, (W, b) in enumerate(parts))
    return (q @ k.mT).softmax(-1) @ v


@of_the_zoo
def split_columns(p, x, tape):
    q, k, v = (tape.layer("W", x, W, term=term) for term, W in enumerate(p["W"].split(2, 1)))
    return (q @ k.mT).softmax(-1) @ v


@of_the_zoo
def selected(p, x, tape):
    for k in range(3):
        x = tape.layer("W", x, p["W"][k], p["b"][k], term=k).tanh()
    return x


@of_the_zoo
def overlapping(p, x, tape):
    h = tape.layer("W", x, p["W"]).tanh()
    y = tape.layer("W", h, p["W"][:3, :2], term=1)
    return nn.functional.pad(y, (0, 1)).sin()


@of_the_zoo
def narrowed(p, x, tape):
    """Weight and bias are parts of one vector."""
    W, b = p["flat"].split([12, 3])
    return tape.layer("flat", x, W.view(3, 4).T, b).tanh()


@of_the_zoo
def concatenated(p, x, tape):
    """Two parameters are one operand."""
    W, b = torch.cat([p["W"], p["V"]]), torch.cat([p["b"], p["c"]])
    return tape.layer("W", x, W.T, b).tanh()
