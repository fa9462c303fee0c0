"""More of the zoo: norms, scales, tokens, look-ups, derived weights, derivatives, experts.

Registered into `zoo.ZOO`, in the same way and for the same tests.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations
from zoo import Made, _mlp, _mlp_params, entry, ints, rand

import fxkfac

# --- norms: what a norm multiplies and adds after it has normalised ---


@entry("norms", x=(3, 4), y=(3,))
def layer_norm_affine():
    """Layer norm with scale and bias between two layers, over tokens."""
    return Made(
        lambda m, x: m.head(m.norm(m.body(x)).tanh()).mean(1),
        body=nn.Linear(4, 5),
        norm=nn.LayerNorm(5),
        head=nn.Linear(5, 3),
    )


@entry("norms", x=(4,), y=(3,))
def layer_norm_without_bias():
    """Layer norm with a scale alone."""
    return nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 3))


@entry("norms", x=(4,), y=(4,))
def layer_norm_bias_only():
    """F.layer_norm with a bias alone."""
    return Made(lambda m, x: F.layer_norm(m.body(x), (4,), None, m.b), body=nn.Linear(4, 4), b=(4,))


@entry("norms", x=(3, 4), y=(3, 4))
def layer_norm_of_two_axes():
    """Layer norm over the last two axes, with a scale of that shape."""
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Tanh())


@entry("norms", x=(3, 4), y=(3,))
def rms_norm():
    """nn.RMSNorm with its scale, over tokens."""
    return Made(
        lambda m, x: m.head(m.norm(x)).mean(1).tanh(), norm=nn.RMSNorm(4), head=nn.Linear(4, 3)
    )


@entry("norms", x=(3, 4), y=(3,))
def rms_norm_by_hand():
    """RMS norm as language models write it: x · rsqrt(mean x² + ε) · w."""

    def forward(m, x):
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return m.head(m.w * normal).sum(1)

    return Made(forward, w=(4,), head=nn.Linear(4, 3))


@entry("norms", x=(2, 5, 5), y=(4, 3, 3))
def group_norm():
    """Group norm after a convolution."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh())


@entry("norms", x=(2, 6), y=(3, 4))
def instance_norm_affine():
    """Instance norm with scale and bias, over a sequence."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, bias=False), nn.InstanceNorm1d(3, affine=True), nn.Tanh()
    )


@entry("norms", x=(4,), y=(3,), coupled=True)
def batch_norm_affine_train():
    """Batch norm in train mode: its scale sees coupled data."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).train()


@entry("norms", x=(2, 5, 5), y=(3, 3, 3))
def batch_norm_affine_eval():
    """Batch norm of images with scale and bias in eval mode."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.randn(3))
    norm.running_var.copy_(torch.rand(3) + 0.5)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Tanh()).eval()


# --- scales: a parameter that multiplies entry by entry ---


@entry("scales", x=(3, 4), y=(3, 4))
def layer_scale():
    """A residual branch times one number for each channel."""
    return Made(lambda m, x: x + m.gamma * m.body(x).tanh(), gamma=(4,), body=nn.Linear(4, 4))


@entry("scales", x=(3, 5), y=(3, 5))
def prelu_per_channel():
    """nn.PReLU with one slope for each channel, which is axis 1."""
    return nn.Sequential(nn.Conv1d(3, 3, 1), nn.PReLU(3))


@entry("scales", x=(4,), y=(3,))
def prelu_single():
    """nn.PReLU with a single slope."""
    return nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))


@entry("scales", x=(4,), y=(4,))
def rezero():
    """ReZero: a scalar in front of every residual branch, the same for two of them."""

    def forward(m, x):
        x = x + m.alpha * m.first(x).tanh()
        return x + m.alpha * m.second(x).tanh()

    return Made(forward, alpha=(), first=nn.Linear(4, 4), second=nn.Linear(4, 4))


@entry("scales", x=(3, 4), y=(3, 4))
def gain_of_one_plus():
    """A gain stored as its difference from one: (1 + w) x."""
    return Made(lambda m, x: (1 + m.w) * m.body(x), w=(4,), body=nn.Linear(4, 4))


@entry("scales", x=(4,), y=(4,))
def addcmul():
    """torch.addcmul of the data with a parameter, and a factor."""
    return Made(
        lambda m, x: torch.addcmul(x, m.w, m.body(x), value=0.5), w=(4,), body=nn.Linear(4, 4)
    )


@entry("scales", x=(), y=(5,))
def outer_product():
    """One number times a vector: random features' frequencies."""
    return Made(lambda m, x: torch.cos(torch.outer(x, m.w) + m.b), w=(5,), b=(5,))


@entry("scales", x=(4,), y=(3,))
def learned_temperature():
    """Logits times a learned inverse temperature, in front of the softmax."""
    return Made(lambda m, x: (m.beta * m.head(x)).softmax(-1), beta=(1,), head=nn.Linear(4, 3))


@entry("scales", x=(4,), y=(4,))
def scaled_and_shifted():
    """One parameter that multiplies the data and is added to them."""
    return Made(lambda m, x: m.w * x.tanh() + m.w, w=(4,))


# --- transposed convolutions ---


@entry("transposed convolutions", x=(2, 4), y=(3, 8))
def transposed_conv_1d():
    """ConvTranspose1d with stride, padding and output padding."""
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(layer, nn.Tanh())


@entry("transposed convolutions", x=(2, 3, 3), y=(2, 7, 7))
def transposed_conv_2d():
    """ConvTranspose2d with stride, after a convolution."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3, stride=2), nn.Sigmoid()
    )


@entry("transposed convolutions", x=(2, 2, 2, 2), y=(2, 3, 3, 3))
def transposed_conv_3d():
    """ConvTranspose3d."""
    return nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.Tanh())


@entry("transposed convolutions", x=(4, 4), y=(6, 8))
def transposed_conv_groups_dilation():
    """ConvTranspose1d with groups and dilation, without bias."""
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False), nn.Tanh())


@entry("transposed convolutions", x=(2, 3, 3), y=(2, 5, 5))
def transposed_conv_functional():
    """F.conv_transpose2d, with one bias for each channel."""
    return Made(lambda m, x: F.conv_transpose2d(x, m.w, m.b).tanh(), w=(2, 2, 3, 3), b=(2,))


# --- tokens: parameters that are put between the data ---


def _block(m, x):
    mixed = x + (x @ x.mT).softmax(-1) @ m.value(x)
    return m.head(mixed).tanh()


@entry("tokens", x=(3, 4), y=(2,))
def class_token_on_zeros():
    """A class token in front of the others, by cat, spread over the data by addition to zeros."""

    def forward(m, x):
        x = torch.cat([torch.zeros_like(x[:, :1]) + m.token, x], dim=1)
        return _block(m, x)[:, 0]

    return Made(forward, token=(1, 1, 4), value=nn.Linear(4, 4), head=nn.Linear(4, 2))


@entry(
    "tokens",
    inputs=lambda n: (rand(n, 3, 4, seed=1), ints(n, 3, high=2, seed=2).bool()),
    y=(3, 2),
)
def mask_token():
    """A mask token where the mask says so, by torch.where."""

    def forward(m, x, mask):
        return _block(m, torch.where(mask.unsqueeze(-1), m.token, x))

    return Made(forward, token=(4,), value=nn.Linear(4, 4), head=nn.Linear(4, 2))


@entry("tokens", x=(3, 4), y=(2,))
def positions_of_tokens():
    """Learned positions, with an axis of length one for the data, added in front of attention."""
    parts = {"positions": (1, 3, 4), "value": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    return Made(lambda m, x: _block(m, x + m.positions).mean(1), **parts)


# --- look-ups: rows or columns of a table ---


@entry("look-ups", inputs=lambda n: ints(n, high=6), y=(3,))
def indexed_rows():
    """W[i]: a table of rows, indexed."""
    return Made(lambda m, i: m.head(m.W[i].tanh()), W=(6, 4), head=nn.Linear(4, 3))


@entry("look-ups", inputs=lambda n: ints(n, 2, high=6), y=(4, 2))
def indexed_columns():
    """W[:, i]: a table of columns, indexed."""
    return Made(lambda m, i: m.W[:, i].movedim(0, 1).tanh(), W=(4, 6))


@entry("look-ups", inputs=lambda n: ints(n, high=6), y=(3,))
def index_select():
    """W.index_select(0, i)."""
    return Made(lambda m, i: m.head(m.W.index_select(0, i).tanh()), W=(6, 4), head=nn.Linear(4, 3))


@entry("look-ups", inputs=lambda n: ints(n, 2, high=6) - 6, y=(3,))
def negative_indices():
    """W[i] with indices that count from the end."""
    return Made(lambda m, i: m.head(m.W[i].tanh()).sum(1), W=(6, 4), head=nn.Linear(4, 3))


@entry("look-ups", inputs=lambda n: ints(n, 3, high=6), y=(4,))
def embedding_bag_mean():
    """nn.EmbeddingBag of bags of one length, the mean."""
    return nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh())


@entry("look-ups", inputs=lambda n: ints(n, 3, high=6), y=(3,))
def embedding_bag_sum():
    """nn.EmbeddingBag, the sum, and a head."""
    return nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum"), nn.Tanh(), nn.Linear(4, 3))


@entry("look-ups", inputs=lambda n: (ints(n, 3, high=6), rand(n, 3, seed=3)), y=(4,))
def embedding_bag_weighted():
    """nn.EmbeddingBag whose rows have weights that come with the data."""
    return Made(
        lambda m, i, w: m.bag(i, per_sample_weights=w).tanh(), bag=nn.EmbeddingBag(6, 4, mode="sum")
    )


def _relative(size):
    places = torch.arange(size)
    return places[:, None] - places[None, :] + size - 1


@entry("look-ups", x=(3, 4), y=(3, 4))
def relative_positions():
    """A table of relative positions, looked up by a buffer and added to attention scores."""

    def forward(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + m.table[m.index].permute(2, 0, 1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return Made(forward, table=(5, 2), index=_relative(3), qkv=nn.Linear(4, 12))


# --- products of more than two tensors, and merged forms ---


@entry("products", inputs=lambda n: (rand(n, 3, seed=1), rand(n, 4, seed=2)), y=(2,))
def bilinear():
    """nn.Bilinear of two inputs."""
    return nn.Bilinear(3, 4, 2)


@entry("products", inputs=lambda n: (rand(n, 3, seed=1), rand(n, 4, seed=2)), y=(5,))
def einsum_with_two_inputs():
    """An einsum of a weight between two inputs."""
    return Made(lambda m, x, z: torch.einsum("ni,oij,nj->no", x, m.W, z).tanh(), W=(5, 3, 4))


@entry("products", x=(3, 4), y=(2,))
def addbmm():
    """torch.addbmm: a sum over experts, whose weights are stacked."""
    return Made(lambda m, x: torch.addbmm(m.b, x.transpose(0, 1), m.W).tanh(), b=(2,), W=(3, 4, 2))


@entry("products", x=(4,), y=())
def mv_of_a_vector():
    """torch.mv of the data with a vector, and a scalar bias."""
    return Made(
        lambda m, x: torch.mv(m.body(x).tanh(), m.w) + m.b, body=nn.Linear(4, 5), w=(5,), b=()
    )


@entry("products", x=(4,), y=())
def dot_by_vmap():
    """torch.dot of one datum with a vector, under vmap."""

    def one(params, x):
        return torch.dot(torch.tanh(params["W"] @ x), params["v"])

    params = {"W": torch.randn(5, 4).double(), "v": torch.randn(5).double()}
    return vmap(one, (None, 0)), params


# --- derived weights: computed from parameters, tapped as a parameter would be ---


@entry(
    "derived weights", x=(4,), y=(3,), options={"structure": {"0.parametrizations.*": "derived"}}
)
def weight_norm():
    """Weight norm, whose weight is tapped."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


@entry("derived weights", x=(4,), y=(3,), options={"structure": {"*original*": "derived"}})
def spectral_norm_eval():
    """Spectral norm in eval mode, whose weight is tapped."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)).eval()


@entry("derived weights", x=(4,), y=(4,), options={"structure": {"*original*": "derived"}})
def cayley():
    """An orthogonal layer by the Cayley map, whose weight is tapped."""
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), nn.Tanh()
    )


@entry("derived weights", x=(3, 4), y=(3, 3), options={"structure": {"[AB]": "derived"}})
def lora_merged():
    """LoRA merged into the frozen weight: W + B A is tapped."""
    return Made(
        lambda m, x: F.linear(x, m.W + m.B @ m.A, m.b).tanh(),
        W=rand(3, 4),
        A=(2, 4),
        B=(3, 2),
        b=(3,),
    )


@entry("derived weights", x=(2, 5, 5), y=(3, 3, 3), options={"structure": {"w": "derived"}})
def standardised_conv():
    """Weight standardisation of a convolution, by hand."""

    def forward(m, x):
        w = (m.w - m.w.mean((1, 2, 3), keepdim=True)) / m.w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, m.b).tanh()

    return Made(forward, w=(3, 2, 3, 3), b=(3,))


# --- derivatives of a network in its inputs ---


@entry("derivatives", x=(2,), y=(1,))
def poisson_by_jvp():
    """The residual of Poisson's equation, with a source, by nested jvp."""

    def f(params, x):
        net = partial(_mlp, params)

        def second(v):
            return jvp(lambda at: jvp(net, (at,), (v,))[1], (x,), (v,))[1]

        basis = torch.eye(2, dtype=x.dtype)
        return sum(second(e.expand_as(x)) for e in basis) + x.sin().prod(-1, keepdim=True)

    return f, _mlp_params(2, 1)


@entry("derivatives", x=(2,), y=())
def poisson_by_hessian():
    """The Laplacian as the trace of torch.func.hessian, under vmap."""

    def one(params, x):
        return hessian(lambda at: _mlp(params, at).squeeze())(x).trace() + x.sin().prod()

    return vmap(one, (None, 0)), _mlp_params(2, 1)


@entry("derivatives", x=(2,), y=(1,))
def poisson_by_forward_laplacian():
    """The Laplacian by fxkfac.laplacian."""
    return (lambda p, x: fxkfac.laplacian(partial(_mlp, p), x).laplacian), _mlp_params(2, 1)


@entry("derivatives", x=(2,), y=(1,))
def heat_equation():
    """u_t − u_xx, by fxkfac.laplacian with weight zero on time."""

    def f(params, x):
        u = fxkfac.laplacian(partial(_mlp, params), x, torch.tensor([0.0, 1.0], dtype=x.dtype))
        return u.gradient[0] - u.laplacian

    return f, _mlp_params(2, 1)


@entry("derivatives", x=(3,), y=(4,))
def energy_and_forces():
    """An energy and its forces by autograd.grad, in one prediction."""

    def forward(m, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = m.net(x)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, -slope], dim=-1)

    return Made(forward, net=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))


@entry("derivatives", x=(2,), y=(2,))
def drift_by_grad():
    """A gradient field by torch.func.grad under vmap, times a learned scale."""

    def one(params, x):
        net = params["net"]
        return params["scale"] * grad(lambda at: _mlp(net, at).squeeze())(x)

    params = {"net": _mlp_params(2, 1), "scale": torch.randn(2).double()}
    return vmap(one, (None, 0)), params


# --- experts: several networks, stacked or chosen ---


@entry("experts", x=(4,), y=(3,))
def soft_mixture():
    """A soft mixture of experts: bmm over stacked weights, summed by a gate."""

    def forward(m, x):
        own = torch.bmm(x.expand(2, -1, -1), m.W) + m.b.unsqueeze(1)
        gate = m.gate(x).softmax(-1)
        return torch.einsum("eno,ne->no", own.tanh(), gate)

    return Made(forward, W=(2, 4, 3), b=(2, 3), gate=nn.Linear(4, 2))


@entry("experts", x=(4,), y=(2, 3))
def ensemble_of_stacked():
    """vmap of an MLP over stacked nested params."""
    params = {
        name: {"W": torch.randn(2, o, i).double(), "b": torch.randn(2, o).double()}
        for name, o, i in (("first", 4, 4), ("second", 3, 4))
    }
    return (lambda p, x: vmap(_mlp, (0, None), 1)(p, x)), params


@entry("experts", x=(5, 4), y=(5, 3))
def capacity_routed():
    """Every expert takes the two tokens of a datum that its gate likes best."""

    def forward(m, x):
        weights, chosen = m.gate(x).softmax(-1).topk(2, dim=1)  # (n, capacity, expert)
        own = [torch.take_along_dim(x, chosen[..., [k]], 1) @ W for k, W in enumerate(m.W)]
        rows = torch.cat([y.tanh() * weights[..., [k]] for k, y in enumerate(own)], dim=1)
        places = chosen.mT.flatten(1).unsqueeze(-1).expand_as(rows)
        return x.new_zeros(x.shape[0], 5, 3).scatter_add(1, places, rows)

    return Made(forward, W=(2, 4, 3), gate=nn.Linear(4, 2))


@entry("experts", x=(3, 4), y=(3, 4))
def switched():
    """Every token goes through the experts that a mask of its gate leaves."""

    def forward(m, x):
        gate = m.gate(x).softmax(-1)
        kept = gate * (gate == gate.amax(-1, keepdim=True))
        own = [expert(x).tanh() for expert in m.experts]
        return sum(kept[..., [k]] * y for k, y in enumerate(own))

    return Made(forward, gate=nn.Linear(4, 2), experts=nn.ModuleList(nn.Linear(4, 4) for _ in "ab"))


@entry("tokens", x=(3, 4), y=(2,))
def class_token():
    """A class token in front of the others, by cat with expand."""

    def forward(m, x):
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1)
        return _block(m, x)[:, 0]

    return Made(forward, token=(1, 1, 4), value=nn.Linear(4, 4), head=nn.Linear(4, 2))


@entry("tokens", x=(3, 4), y=(3, 2))
def register_tokens():
    """Two register tokens behind the others, which the head does not see."""

    def forward(m, x):
        x = torch.cat([x, m.registers.unsqueeze(0).expand(x.shape[0], -1, -1)], dim=1)
        return _block(m, x)[:, :-2]

    return Made(forward, registers=(2, 4), value=nn.Linear(4, 4), head=nn.Linear(4, 2))


@entry("tokens", x=(3, 4), y=(2,))
def positions_and_class_token():
    """A class token, then learned positions added to all."""

    def forward(m, x):
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1) + m.positions
        return _block(m, x).mean(1)

    parts = {"token": (1, 1, 4), "positions": (1, 4, 4)}
    return Made(forward, **parts, value=nn.Linear(4, 4), head=nn.Linear(4, 2))


# --- experts that rows choose ---


@entry("experts", x=(3, 4), y=(3, 2))
def top_two_of_stacked():
    """Every token goes through two of the stacked experts, W[i] and b[i], by einsum."""

    def forward(m, x):
        weights, chosen = m.gate(x).softmax(-1).topk(2, dim=-1)  # (n, t, 2)
        own = torch.einsum("nti,ntkio->ntko", x, m.W[chosen]) + m.b[chosen]
        return torch.einsum("ntko,ntk->nto", own.tanh(), weights)

    return Made(forward, W=(3, 4, 2), b=(3, 2), gate=nn.Linear(4, 3))


@entry("experts", x=(3, 4), y=(3, 2))
def gathered_for_bmm():
    """Weights gathered for every token of the flattened batch, then bmm."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        chosen = m.gate(flat).argmax(-1)
        own = torch.bmm(m.W[chosen], flat.unsqueeze(-1)).squeeze(-1)
        return own.tanh().unflatten(0, x.shape[:2])

    return Made(forward, W=(3, 2, 4), gate=nn.Linear(4, 3))


@entry("experts", x=(3, 4), y=(3, 2), coupled=True, reduce=False)
def expert_choice():
    """Every expert takes the tokens that it likes best, of whatever datum."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        weights, chosen = (flat @ m.gate).softmax(-1).mT.topk(2, dim=1)
        own = torch.bmm(flat[chosen], m.W) * weights.unsqueeze(-1)
        out = flat.new_zeros(len(flat), 2).index_add(0, chosen.flatten(), own.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])

    return Made(forward, W=(2, 4, 2), gate=(4, 2))


# --- what is taken apart: interpolation, quotients, several indices ---


@entry("parametrisations", x=(3, 4), y=(3, 2))
def token_shift():
    """Each channel between a token and the one before it, by torch.lerp with learned weights."""

    def forward(m, x):
        before = F.pad(x, (0, 0, 1, -1))
        return m.head(torch.tanh(m.key(torch.lerp(x, before, m.mix))))

    return Made(forward, mix=(4,), key=nn.Linear(4, 4), head=nn.Linear(4, 2))


@entry("parametrisations", x=(4,), y=(4,))
def quotients():
    """A parameter over data, by division and by addcdiv."""

    def forward(m, x):
        by = 1 + x.square()
        return torch.addcdiv(m.shift, m.gain, by, value=0.5) + torch.tanh(m.scale / by)

    return Made(forward, shift=(4,), gain=(4,), scale=(4,))


@entry("look-ups", x=(3, 4), y=(3, 4))
def two_indices():
    """A table of relative positions, looked up by two indices at once."""

    def forward(m, x):
        row = x.argsort(-1)
        return torch.tanh(m.table[row, row.flip(-1)].sum(-1) + m.scale * x)

    return Made(forward, table=(4, 4, 3), scale=(4,))


@entry("look-ups", x=(2, 3, 4), y=(3,))
def relative_positions_of_blocks():
    """A table of relative positions, the same for every block of a sequence."""

    def forward(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).movedim(-3, 0).transpose(-3, -2)
        bias = m.table(m.index).movedim(-1, 0)[None, None]
        scores = (q @ k.mT + bias).softmax(-1)
        return m.head((scores @ v).flatten(2).mean(1))

    index = _relative(3)
    return Made(
        forward, table=nn.Embedding(5, 2), index=index, qkv=nn.Linear(4, 12), head=nn.Linear(12, 3)
    )


@entry("recurrent", x=(3, 4), y=(3,), options={"structure": {"decay": "diagonal"}})
def decay_by_hand():
    """A state that decays by a learned rate, written step by step into a tensor of zeros."""

    def forward(m, x):
        x = m.layer(x)
        out, state = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = state * torch.exp(-torch.exp(m.decay)) + x[:, step]
            out[:, step] = state
        return m.head(out.tanh().mean(1))

    return Made(forward, layer=nn.Linear(4, 4), decay=(4,), head=nn.Linear(4, 3))
