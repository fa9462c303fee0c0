"""A zoo of small models, in the many styles in which people write them.

Every entry is one function that builds a model; its docstring is the entry's description. `ZOO`
holds all of them by name, `SPELLINGS` the groups of models that are one and the same map. All is
float64 (but where an entry is about dtypes), tiny, and the same in every run.

    @entry("module style", x=(4,), y=(3,))
    def sequential():
        \"\"\"nn.Sequential of linear layers.\"\"\"
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from drawn import StraightThrough
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxkfac

F64 = torch.float64
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()

Model = nn.Module | Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """One model with its data.

    Attributes:
        name, group, description: What it is; the description is one line.
        build: () -> (model, params), with `params` the nested dict of a functional model.
        inputs: n -> a batch of n data, always the same.
        targets: n -> their targets.
        loss: What the targets are for.
        trace_options: Further arguments of `fxkfac.trace`.
        target_axis: Batch axis of the targets.
        expected: "right", or "refused": then tracing must raise an error of fxkfac's.
        unshared: Every parameter is used once and as one matrix, with one row for each datum.
        coupled: One datum's prediction depends on the others'.
        random: The model draws random numbers.
        reduce: Whether the batch axis of every use can be found.
        tolerance: How far off gradients may be, for entries of lower precision.
    """

    name: str
    group: str
    description: str
    build: Callable[[], tuple[Model, Mapping[str, Any] | None]]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Tensor]
    loss: nn.Module
    trace_options: Mapping[str, Any] = field(default_factory=dict)
    target_axis: int = 0
    expected: str = "right"
    unshared: bool = False
    coupled: bool = False
    random: bool = False
    reduce: bool = True
    tolerance: float = 1e-9

    def data(self, n: int) -> tuple[Any, Tensor]:
        """A batch of n data."""
        return self.inputs(n), self.targets(n)

    def trace(self, model: Model, params: Mapping[str, Any] | None, n: int) -> fxkfac.Program:
        """Trace what was built, on a batch of n data."""
        options = dict(self.trace_options) | ({} if params is None else {"params": params})
        return fxkfac.trace(model, self.inputs(n), **options)

    def take(self, data: tuple[Any, Tensor], index: Any) -> tuple[Any, Tensor]:
        """Some of the data, by their numbers."""
        inputs, targets = data
        index = torch.as_tensor(index)
        axis = self.trace_options.get("batch_axis", 0)
        if isinstance(axis, tuple):
            pairs = zip(inputs, axis, strict=True)
            chosen: Any = type(inputs)(_take(t, a, index) for t, a in pairs)
        else:
            chosen = pytree.tree_map(lambda t: _take(t, axis, index), inputs)
        return chosen, _take(targets, self.target_axis, index)


def _take(t: Any, axis: int | None, index: Tensor) -> Any:
    return t.index_select(axis, index) if isinstance(t, Tensor) and axis is not None else t


ZOO: dict[str, Entry] = {}


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on the shape and the seed alone."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def ints(*shape: int, high: int, seed: int = 0) -> Tensor:
    """Whole numbers below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _targets(loss: nn.Module, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    if loss is CE:
        return lambda n: ints(n, *shape[1:], high=shape[0], seed=11)
    if loss is BCE:
        return lambda n: rand(n, *shape, seed=11).sigmoid()
    return lambda n: rand(n, *shape, seed=11)


def _seeded(build: Callable[[], Any], keep_dtype: bool) -> tuple[Model, Any]:
    """Build with all parameters drawn anew, so that none is zero and no two are alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build()
        model, params = built if isinstance(built, tuple) else (built, None)
        if isinstance(model, nn.Module):
            model if keep_dtype else model.double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.5 * torch.randn_like(parameter))
        return model, params


def entry(
    group: str,
    *,
    y: tuple[int, ...] = (),
    x: tuple[int, ...] | None = None,
    inputs: Callable[[int], Any] | None = None,
    targets: Callable[[int], Tensor] | None = None,
    loss: nn.Module = MSE,
    options: Mapping[str, Any] | None = None,
    keep_dtype: bool = False,
    **flags: Any,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that builds a model, or (function, params).

    Args:
        group: The kind of style.
        y: Shape of one datum's prediction; for CE, the classes come first.
        x: Shape of one datum, where the input is one tensor.
        inputs, targets: n -> inputs, targets, where they are not given by shapes.
        loss: MSE, CE or BCE.
        options: Further arguments of `fxkfac.trace`.
        keep_dtype: Do not turn the module into float64.
        **flags: See `Entry`.
    """

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        name = build.__name__
        assert name not in ZOO, f"{name} is in the zoo already"
        ZOO[name] = Entry(
            name=name,
            group=group,
            description=(build.__doc__ or "").strip(),
            build=partial(_seeded, build, keep_dtype),
            inputs=inputs or (lambda n: rand(n, *(x or ()), seed=7)),
            targets=targets or _targets(loss, y),
            loss=loss,
            trace_options=options or {},
            **flags,
        )
        return build

    return register


class Made(nn.Module):
    """A module whose forward is a function: of itself and the inputs.

    A tuple of ints becomes a parameter of that shape, a tensor a buffer, a module a sub-module.
    """

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, tuple):
                self.register_parameter(name, nn.Parameter(torch.randn(part)))
            elif isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


# --- module style: how modules are put together ---


@entry("module style", x=(4,), y=(3,), unshared=True)
def sequential():
    """nn.Sequential of linear layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@entry("module style", x=(4,), y=(3,), loss=CE, unshared=True)
def subclass():
    """A subclass of nn.Module with named layers, for classification."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    return Net()


@entry("module style", x=(4,), y=(2,), loss=BCE, unshared=True)
def module_list():
    """Layers in an nn.ModuleList, run by a loop."""

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = layer(x) if k == len(self.layers) - 1 else layer(x).sin()
        return x

    return Made(forward, layers=nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)]))


@entry("module style", x=(4,), y=(3,), unshared=True)
def module_dict():
    """Layers in an nn.ModuleDict, chosen by key."""
    layers = nn.ModuleDict({"in": nn.Linear(4, 5), "out": nn.Linear(5, 3)})
    return Made(lambda m, x: m.layers["out"](m.layers["in"](x).tanh()), layers=layers)


@entry("module style", x=(4,), y=(3,), loss=CE, unshared=True)
def nested_modules():
    """Blocks inside of blocks."""

    def block(d_in, d_out):
        return nn.Sequential(nn.Linear(d_in, d_out), nn.Sequential(nn.Tanh(), nn.Identity()))

    return nn.Sequential(block(4, 5), nn.Sequential(block(5, 4), nn.Linear(4, 3)))


@entry("module style", x=(4,), y=(3,), unshared=True)
def parameter_list():
    """Weights in an nn.ParameterList and an nn.ParameterDict."""

    def forward(self, x):
        for W, b in zip(self.weights, self.biases.values(), strict=True):
            x = torch.tanh(x @ W + b)
        return x

    weights = nn.ParameterList([torch.zeros(4, 5), torch.zeros(5, 3)])
    biases = nn.ParameterDict({"first": torch.zeros(5), "second": torch.zeros(3)})
    return Made(forward, weights=weights, biases=biases)


@entry(
    "module style",
    inputs=lambda n: {"image": rand(n, 4, seed=1), "context": rand(n, 2, seed=2)},
    y=(3,),
    unshared=True,
)
def keyword_inputs():
    """A dict of keyword arguments."""

    def forward(self, *, context, image):
        return self.head(torch.tanh(self.a(image) + self.b(context)))

    return Made(forward, a=nn.Linear(4, 3), b=nn.Linear(2, 3, bias=False), head=nn.Linear(3, 3))


@entry(
    "module style",
    inputs=lambda n: (rand(n, 4, seed=1), rand(n, 2, seed=2)),
    y=(3,),
    loss=CE,
    unshared=True,
)
def tuple_inputs():
    """Two positional tensors, concatenated."""
    return Made(lambda m, a, b: m.head(torch.cat([a, b], -1)).tanh(), head=nn.Linear(6, 3))


@entry("module style", inputs=lambda n: [rand(n, 4, seed=1), rand(n, 4, seed=2)], y=(2,))
def list_inputs():
    """A list of tensors, each through the same layer."""
    return Made(lambda m, *xs: sum(m.net(x).tanh() for x in xs), net=nn.Linear(4, 2))


@entry("module style", inputs=lambda n: (rand(n, 4, seed=1), 3), y=(3,))
def number_input():
    """A number beside the tensor says how often a layer runs."""

    def forward(self, x, steps):
        for _ in range(steps):
            x = x + self.step(x).tanh()
        return self.head(x)

    return Made(forward, step=nn.Linear(4, 4), head=nn.Linear(4, 3))


@entry("module style", x=(4,), y=(3,), unshared=True)
def returns_dict():
    """The prediction is in a dict, as models with many outputs return it."""
    return Made(lambda m, x: {"logits": m.head(x).tanh()}, head=nn.Linear(4, 3))


@entry("module style", x=(4,), y=(4,))
def shared_module():
    """One layer under two names."""
    layer = nn.Linear(4, 4)
    return Made(lambda m, x: m.b(m.a(x).tanh()), a=layer, b=layer)


@entry("module style", x=(4,), y=(4,))
def tied_autoencoder():
    """Encoder and decoder share one parameter object, in two orientations."""
    model = Made(
        lambda m, x: F.linear(m.encode(x).tanh(), m.decode.T, m.bias),
        encode=nn.Linear(4, 3),
        bias=(4,),
    )
    model.decode = model.encode.weight
    return model


@entry("module style", x=(4,), y=(4,))
def tied_modules():
    """Two layers of the same size whose weights were set to be the same."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@entry("module style", x=(4,), y=(3,))
def called_twice():
    """A module that is called twice."""
    return Made(
        lambda m, x: m.head(m.body(m.body(x).tanh()).sin()),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


@entry("module style", x=(4,), y=(3,), loss=CE, unshared=True)
def in_place_activations():
    """Activations that overwrite the layer's output."""
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 5),
        nn.ELU(inplace=True),
        nn.Linear(5, 3),
    )


@entry("module style", x=(4,), y=(3,), unshared=True)
def in_place_arithmetic():
    """mul_, add_ and slices that are written to, right after a layer."""

    def forward(self, x):
        h = self.first(x)
        h.mul_(2.0).add_(x.mean(-1, keepdim=True))
        h[:, 0] = x[:, 1] * x[:, 2]
        h[:, 1:3] += x[:, :2]
        return self.second(h.tanh_())

    return Made(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 3))


@entry("module style", x=(4,), y=(4,), loss=CE, unshared=True)
def residual():
    """A residual block whose sum is made in place."""

    def forward(self, x):
        h = self.b(self.a(x).relu())
        h += x
        return self.head(h)

    return Made(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 4), head=nn.Linear(4, 4))


@entry("module style", x=(4,), y=(3,), unshared=True)
def branches():
    """Branches that are concatenated, multiplied and added."""

    def forward(self, x):
        a, b, c = self.a(x), self.b(x).sigmoid(), self.c(x)
        return self.head(torch.cat([a * b, c], dim=1)) + self.skip(x)

    parts = {k: nn.Linear(4, 2) for k in "abc"}
    return Made(forward, **parts, head=nn.Linear(4, 3), skip=nn.Linear(4, 3, bias=False))


@entry("module style", x=(4,), y=(3,), unshared=True)
def gated():
    """A gated feed-forward block without biases."""
    parts = {k: nn.Linear(4, 5, bias=False) for k in ("gate", "up")}
    return Made(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), **parts, down=nn.Linear(5, 3, bias=False)
    )


@entry("module style", x=(4,), y=(3,), loss=CE, random=True)
def dropout_train():
    """Dropout in train mode."""
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 3)).train()


@entry("module style", x=(4,), y=(3,), unshared=True)
def dropout_eval():
    """Dropout in eval mode."""
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 3)).eval()


@entry("module style", x=(4,), y=(3,), coupled=True)
def batch_norm_train():
    """Batch norm without scale in train mode, which counts its batches."""
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 3)
    ).train()


@entry("module style", x=(2, 5, 5), y=(3,), loss=CE)
def batch_norm_eval():
    """Batch norm without scale in eval mode, with statistics of its own."""
    norm = nn.BatchNorm2d(3, affine=False)
    norm.running_mean.copy_(torch.randn(3))
    norm.running_var.copy_(torch.rand(3) + 0.5)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 3)
    ).eval()


@entry("module style", x=(3, 4), y=(3,))
def layer_norm():
    """Layer norm without scale, before the layer."""
    return Made(
        lambda m, x: m.head(m.norm(m.body(m.norm(x)).relu() + x)).mean(1),
        norm=nn.LayerNorm(4, elementwise_affine=False),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


@entry("module style", x=(4,), y=(3,), unshared=True)
def frozen_lower_layers():
    """Only the head is trained; what is below asks for no gradients."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[:3].requires_grad_(False)
    return model


@entry("module style", x=(4,), y=(3,), options={"params": ["0.*"]}, unshared=True)
def chosen_lower_layer():
    """Only the first layer is asked for, by a pattern."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@entry("module style", x=(4,), y=(3,), options={"params": ["*bias"]}, unshared=True)
def biases_only():
    """Only the biases are asked for."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@entry("module style", x=(4,), y=(3,), unshared=True)
def unused_parameter():
    """A layer that no one calls: its curvature is zero."""
    return Made(lambda m, x: m.head(x).tanh(), head=nn.Linear(4, 3), spare=nn.Linear(2, 2))


@entry("module style", x=(4,), y=(3,), unshared=True)
def no_bias():
    """Layers without bias."""
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))


@entry("module style", x=(4,), y=(3,), unshared=True)
def parametrized():
    """torch's parametrization: the stored weight is the transpose."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    transposed = Made(lambda m, W: W.T)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.T.contiguous())
        nn.utils.parametrize.register_parametrization(layer, "weight", transposed, unsafe=True)
    return model


@entry("module style", x=(4,), y=(3,), unshared=True)
def checkpointed():
    """A block whose activations are computed again in the backward pass."""
    return Made(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False).tanh()),
        body=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
        head=nn.Linear(4, 3),
    )


@entry("module style", x=(4,), y=(3,), options={"params": ["body.0.*"]}, unshared=True)
def checkpointed_in_part():
    """A block that is computed again in the backward pass, of which one layer is asked for."""
    return Made(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False).tanh()),
        body=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
        head=nn.Linear(4, 3),
    )


@entry("module style", x=(4,), y=(3,), unshared=True)
def scalar_branch():
    """A branch decided by the number of features, an assertion on shapes."""

    def forward(self, x):
        assert x.ndim == 2, "needs a batch of vectors"
        assert x.shape[1] == 4, "needs four features"
        h = self.wide(x) if x.shape[-1] > 3 else self.narrow(x)
        return self.head(h.relu())

    return Made(forward, wide=nn.Linear(4, 5), narrow=nn.Linear(3, 5), head=nn.Linear(5, 3))


@entry("module style", x=(2, 3), y=(3,))
def siamese():
    """Both halves of a pair go through one tower; their difference is scored."""

    def forward(self, pair):
        a, b = self.tower(pair[:, 0]), self.tower(pair[:, 1])
        return self.score((a - b).square())

    return Made(
        forward, tower=nn.Sequential(nn.Linear(3, 4), nn.Tanh()), score=nn.Linear(4, 3, bias=False)
    )


@entry("module style", x=(4,), y=(3,), unshared=True)
def lora():
    """A frozen layer and its low-rank update, x W + x A B."""
    model = Made(lambda m, x: (x @ m.W + x @ m.A @ m.B).tanh(), W=(4, 3), A=(4, 2), B=(2, 3))
    model.W.requires_grad_(False)
    return model


@entry("module style", x=(4,), y=(3,), unshared=True)
def lora_trained():
    """The layer and its low-rank update are both trained."""
    return Made(lambda m, x: (x @ m.A @ m.B + x @ m.W).tanh(), W=(4, 3), A=(4, 2), B=(2, 3))


@entry("module style", x=(4,), y=(3,), unshared=True)
def compiled():
    """A module behind torch.compile."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return torch.compile(model, backend="eager")


class _Output(NamedTuple):
    logits: Tensor


@entry("module style", x=(4,), y=(3,), unshared=True)
def returns_named_tuple():
    """The prediction is the one field of a named tuple."""
    return Made(lambda m, x: _Output(m.head(x).tanh()), head=nn.Linear(4, 3))


# --- products: how a weight meets an input ---


@entry("products", x=(4,), y=(3,), unshared=True)
def unfused_in_out():
    """x @ W + b, the weight stored as (in, out)."""
    return Made(
        lambda m, x: torch.tanh(x @ m.W + m.b) @ m.V + m.c, W=(4, 5), b=(5,), V=(5, 3), c=(3,)
    )


@entry("products", x=(4,), y=(3,), loss=CE, unshared=True)
def unfused_out_in():
    """x @ W.T + b."""
    return Made(
        lambda m, x: m.c + torch.tanh(m.b + x @ m.W.T) @ m.V.mT, W=(5, 4), b=(5,), V=(3, 5), c=(3,)
    )


@entry("products", x=(4,), y=(3,), unshared=True)
def functional_linear():
    """F.linear with parameters of one's own."""
    return Made(
        lambda m, x: F.linear(F.linear(x, m.W, m.b).tanh(), m.V), W=(5, 4), b=(5,), V=(3, 5)
    )


@entry("products", x=(4,), y=(3,), unshared=True)
def addmm():
    """torch.addmm."""
    return Made(
        lambda m, x: torch.addmm(m.c, torch.addmm(m.b, x, m.W).tanh(), m.V.t()),
        W=(4, 5), b=(5,), V=(3, 5), c=(3,),
    )  # fmt: skip


@entry("products", x=(4,), y=(3,), unshared=True)
def addmm_scaled():
    """torch.addmm with alpha and beta."""
    return Made(
        lambda m, x: torch.addmm(m.b, x, m.W, alpha=0.7, beta=-1.3).tanh(), W=(4, 3), b=(3,)
    )


@entry("products", x=(4,), y=(3,), unshared=True)
def mm():
    """torch.mm, and a bias that is subtracted."""
    return Made(lambda m, x: torch.tanh(torch.mm(x, m.W) - m.b), W=(4, 3), b=(3,))


@entry("products", x=(4,), y=(3,), unshared=True)
def bias_from_the_left():
    """A bias from which the product is taken away, and one that is added twice over."""
    return Made(
        lambda m, x: torch.add((m.b - x @ m.W).tanh() @ m.V, m.c, alpha=2),
        W=(4, 3), b=(3,), V=(3, 3), c=(3,),
    )  # fmt: skip


@entry("products", x=(4,), y=(), unshared=True)
def matrix_vector():
    """The parameter is a vector: x @ w, one number for each datum."""
    return Made(lambda m, x: torch.tanh(x @ m.W).mv(m.w) + m.b, W=(4, 5), w=(5,), b=(1,))


@entry("products", x=(4,), y=(3,), unshared=True)
def tensordot_and_inner():
    """torch.tensordot and torch.inner."""
    return Made(
        lambda m, x: torch.inner(torch.tensordot(x, m.W, dims=1).tanh(), m.V), W=(4, 5), V=(3, 5)
    )


@entry("products", x=(4,), y=(3,), unshared=True)
def einsum_out_in():
    """einsum nd,od->no."""
    return Made(lambda m, x: torch.einsum("nd,od->no", x, m.W).tanh() + m.b, W=(3, 4), b=(3,))


@entry("products", x=(4,), y=(3,), unshared=True)
def einsum_in_out():
    """einsum od,nd->on, the weight first and the result transposed."""
    return Made(lambda m, x: torch.einsum("od,nd->on", m.W, x).T.tanh(), W=(3, 4))


@entry("products", x=(5, 4), y=(3, 5), loss=CE)
def einsum_implicit():
    """einsum without an arrow (its result is not), and a bias along the middle axis."""
    return Made(lambda m, x: torch.einsum("nti,io", x, m.W) + m.b[:, None], W=(4, 3), b=(3,))


@entry("products", x=(2, 3, 4), y=(3,))
def einsum_ellipsis():
    """einsum ...i,oi->...o over two shared axes."""
    return Made(
        lambda m, x: torch.einsum("...i,oi->...o", x, m.W).add(m.b).tanh().mean((1, 2)),
        W=(3, 4), b=(3,),
    )  # fmt: skip


@entry("products", x=(3, 4), y=(3, 4))
def einsum_heads():
    """Per-head projections bsi,hid->bhsd and back bhsd,hdo->bso."""

    def forward(self, x):
        h = torch.einsum("bsi,hid->bhsd", x, self.W) + self.b[:, None]
        return torch.einsum("bhsd,hdo->bso", h.tanh(), self.V) + self.c

    return Made(forward, W=(2, 4, 3), b=(2, 3), V=(2, 3, 4), c=(4,))


@entry("products", x=(2, 3), y=(2, 3))
def einsum_groups():
    """One weight for each place: a group axis, ngi,gio->ngo."""
    return Made(
        lambda m, x: torch.einsum("ngi,gio->ngo", x, m.W).tanh() + m.b, W=(2, 3, 3), b=(2, 3)
    )


@entry("products", x=(5, 4), y=(2, 5, 3))
def bmm_experts():
    """torch.bmm with one weight for each expert, all of which see all tokens."""

    def forward(self, x):
        n, t, d = x.shape
        tokens = x.reshape(1, n * t, d).expand(2, n * t, d)
        return torch.bmm(tokens, self.W).tanh().view(2, n, t, 3).transpose(0, 1)

    return Made(forward, W=(2, 4, 3))


@entry("products", x=(2, 4), y=(2, 3))
def baddbmm():
    """torch.baddbmm with a bias for each expert."""
    return Made(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.W).tanh().transpose(0, 1),
        W=(2, 4, 3), b=(2, 1, 3),
    )  # fmt: skip


@entry("products", x=(5, 4), y=(2, 5, 3))
def matmul_stack():
    """matmul of a broadcast stack: (n, 1, t, i) @ (h, i, o)."""
    return Made(lambda m, x: torch.tanh(x.unsqueeze(1) @ m.W + m.b), W=(2, 4, 3), b=(2, 1, 3))


@entry("products", x=(4,), y=(3,), unshared=True)
def from_the_left():
    """W @ x with the data in columns."""
    return Made(
        lambda m, x: (m.V @ torch.tanh(m.W @ x.T + m.b[:, None])).T, W=(5, 4), b=(5,), V=(3, 5)
    )


@entry("products", x=(4, 5), y=(3, 5), loss=CE)
def from_the_left_stack():
    """W @ x with x of shape (n, in, t)."""
    return Made(lambda m, x: m.W @ x + m.b.unsqueeze(-1), W=(3, 4), b=(3,))


@entry("products", x=(3, 4), y=(3,))
def over_tokens():
    """A mixer: one layer over the tokens, one over the channels."""

    def forward(self, x):
        x = x + self.tokens(x.transpose(1, 2)).tanh().transpose(1, 2)
        return self.channels(x).mean(1)

    return Made(forward, tokens=nn.Linear(3, 3), channels=nn.Linear(4, 3))


@entry("products", x=(5, 4), y=(3,), loss=CE)
def flattened_rows():
    """Tokens of all data as one long list of rows."""

    def forward(self, x):
        n, t, d = x.shape
        return self.layer(x.reshape(n * t, d)).tanh().view(n, t, 3).mean(1)

    return Made(forward, layer=nn.Linear(4, 3))


@entry("products", x=(2, 3, 4), y=(2, 3, 3))
def flattened_in_the_middle():
    """Rows (outer, n, inner) on one axis."""

    def forward(self, x):
        n = x.shape[0]
        rows = x.transpose(0, 1).reshape(-1, 4) @ self.W
        return rows.tanh().reshape(2, n, 3, 3).transpose(0, 1)

    return Made(forward, W=(4, 3))


@entry("products", x=(3, 4), y=(3,))
def with_einops():
    """rearrange and repeat around the layers."""

    def forward(self, x):
        h = self.layer(rearrange(x, "n t d -> (n t) d")).tanh()
        h = rearrange(h, "(n t) d -> n (t d)", t=3)
        return self.head(repeat(h, "n d -> n (d r)", r=2))

    return Made(forward, layer=nn.Linear(4, 2), head=nn.Linear(12, 3))


@entry("products", inputs=lambda n: (rand(n, 4, seed=1), rand(n, 3, 4, seed=2)), y=(3,))
def different_ranks():
    """One layer on vectors and on sequences."""
    return Made(
        lambda m, q, k: (m.layer(q).tanh().unsqueeze(1) + m.layer(k).sin()).mean(1),
        layer=nn.Linear(4, 3),
    )


@entry("products", x=(4,), y=(3,), unshared=True)
def multi_dot():
    """torch.linalg.multi_dot, which chooses the order of the products by size."""
    return Made(lambda m, x: torch.linalg.multi_dot([x, m.A, m.B]).tanh(), A=(4, 2), B=(2, 3))


@entry("products", x=(4,), y=(3,), unshared=True)
def einsum_of_three():
    """An einsum of the data and two weights."""
    return Made(lambda m, x: torch.einsum("ni,ir,ro->no", x, m.A, m.B).tanh(), A=(4, 2), B=(2, 3))


@entry("products", x=(4,), y=(4,))
def there_and_back():
    """x W and then Wᵀ: both orientations of one weight, one after the other."""
    return Made(lambda m, x: torch.tanh(x @ m.W) @ m.W.T, W=(4, 3))


@entry("products", x=(4,), y=(3,))
def bias_added_twice():
    """One bias that is added in two places."""
    return Made(lambda m, x: torch.tanh(x @ m.W + m.b) @ m.V + m.b, W=(4, 3), b=(3,), V=(3, 3))


@entry("products", x=(3, 4), y=(2, 4))
def learned_queries():
    """Attention from queries that are parameters: the weight is on the left of each datum."""
    return Made(lambda m, x: (m.queries @ x.mT).softmax(-1) @ x, queries=(2, 4))


# --- views: what lies between a parameter and its product ---


@entry("views", x=(4,), y=(3,), unshared=True)
def viewed():
    """Weights stored flat, and viewed as matrices."""
    return Made(lambda m, x: (x @ m.W.view(4, 5)).tanh() @ m.V.reshape(3, 5).t(), W=(20,), V=(15,))


@entry("views", x=(4,), y=(6,), unshared=True)
def permuted():
    """A weight of three axes, permuted and flattened."""
    return Made(lambda m, x: (x @ m.W.permute(1, 2, 0).reshape(4, 6)).tanh(), W=(3, 4, 2))


@entry("views", x=(3, 4), y=(3, 2))
def sliced_qkv():
    """A packed weight and a packed bias, sliced apart."""

    def forward(self, x):
        q, k, v = (
            F.linear(x, self.W[2 * j : 2 * j + 2], self.b[2 * j : 2 * j + 2]) for j in range(3)
        )
        return (q @ k.mT).softmax(-1) @ v

    return Made(forward, W=(6, 4), b=(6,))


@entry("views", x=(3, 4), y=(3, 2))
def split_qkv():
    """A packed weight, split by sizes; queries and keys by chunk."""

    def forward(self, x):
        qk, v = self.W.split([4, 2])
        q, k = qk.chunk(2)
        return ((x @ q.T) @ (x @ k.T).mT).softmax(-1) @ (x @ v.T)

    return Made(forward, W=(6, 4))


@entry("views", x=(3, 4), y=(3, 2))
def split_columns():
    """Columns of a packed (in, out) weight."""

    def forward(self, x):
        q, k, v = self.W.tensor_split(3, dim=1)
        return ((x @ q) @ (x @ k).mT).softmax(-1) @ (x @ v)

    return Made(forward, W=(4, 6))


@entry("views", x=(3, 4), y=(3, 2))
def unbound_qkv():
    """Weights in a stack, unbound."""

    def forward(self, x):
        q, k, v = (x @ W + b for W, b in zip(self.W.unbind(0), self.b.unbind(), strict=True))
        return (q @ k.mT).softmax(-1) @ v

    return Made(forward, W=(3, 4, 2), b=(3, 2))


@entry("views", x=(4,), y=(4,))
def selected():
    """One layer after the other from a stack of weights, by index."""

    def forward(self, x):
        for k in range(3):
            x = torch.tanh(x @ self.W[k] + self.b[k])
        return x

    return Made(forward, W=(3, 4, 4), b=(3, 4))


@entry("views", x=(4,), y=(3,))
def narrowed():
    """Parts of one long vector of parameters, by narrow."""

    def forward(self, x):
        W, b = self.flat.narrow(0, 0, 12).view(3, 4), self.flat.narrow(0, 12, 3)
        return F.linear(x, W, b).tanh()

    return Made(forward, flat=(15,))


@entry("views", x=(4,), y=(5,), unshared=True)
def concatenated():
    """Two weights and two biases that are put together before the product."""
    return Made(
        lambda m, x: F.linear(x, torch.cat([m.W, m.V]), torch.cat([m.b, m.c])).tanh(),
        W=(2, 4), V=(3, 4), b=(2,), c=(3,),
    )  # fmt: skip


@entry("views", x=(2, 4), y=(2, 3))
def stacked():
    """Two weights that are stacked for a batched product."""
    return Made(
        lambda m, x: torch.einsum("ngi,gio->ngo", x, torch.stack([m.W, m.V])).tanh(),
        W=(4, 3), V=(4, 3),
    )  # fmt: skip


@entry("views", x=(5, 4), y=(5, 3))
def expanded():
    """A weight that is expanded over the batch for bmm."""
    return Made(
        lambda m, x: torch.bmm(x, m.W.unsqueeze(0).expand(x.shape[0], 4, 3)).tanh() + m.b,
        W=(4, 3), b=(3,),
    )  # fmt: skip


@entry("views", x=(4,), y=(3,), unshared=True)
def unsqueezed():
    """Vectors as matrices of one row, and back."""
    return Made(
        lambda m, x: (x.unsqueeze(1) @ m.W.unsqueeze(0)).squeeze(1).add(m.b[None]).tanh(),
        W=(4, 3), b=(3,),
    )  # fmt: skip


@entry("views", x=(4,), y=(3,), keep_dtype=True, tolerance=1e-6, unshared=True)
def cast():
    """float32 parameters, cast to float64 where they are used."""
    return Made(lambda m, x: F.linear(x, m.W.double(), m.b.to(x.dtype)).tanh(), W=(3, 4), b=(3,))


@entry("views", x=(4,), y=(3,))
def overlapping():
    """A weight that is used whole, and its first rows again."""
    return Made(lambda m, x: F.pad((x @ m.W).tanh() @ m.W[:3, :2], (0, 1)).sin(), W=(4, 3))


@entry("views", x=(4,), y=(3,), unshared=True)
def flipped():
    """A weight that is flipped, rolled and moved about."""
    return Made(
        lambda m, x: (x @ m.W.flip(0).movedim(0, 1).roll(1, 0).contiguous()).tanh(), W=(3, 4)
    )


@entry("views", x=(4,), y=(4,))
def shared_storage():
    """Two parameter objects on one storage."""
    model = Made(lambda m, x: F.linear(F.linear(x, m.W).tanh(), m.V), W=(4, 4), V=(4, 4))
    model.double()
    model.V = nn.Parameter(model.W.data)
    return model


# --- sequences ---


@entry("sequences", x=(5, 3), y=(3,))
def recurrent_by_hand():
    """A recurrent cell, run by hand from a zero state."""

    def forward(self, x):
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inp(x[:, t]) + self.rec(h))
        return self.head(h)

    return Made(forward, inp=nn.Linear(3, 4), rec=nn.Linear(4, 4, bias=False), head=nn.Linear(4, 3))


@entry("sequences", x=(3, 3), y=(3, 3))
def recurrent_stacked():
    """A recurrent cell on x and state together; all outputs are stacked."""

    def forward(self, x):
        h, out = x.new_zeros((len(x), 4)), []
        for step in x.unbind(1):
            h = torch.tanh(torch.cat([step, h], 1) @ self.W + self.b)
            out.append(h @ self.V)
        return torch.stack(out, 1)

    return Made(forward, W=(7, 4), b=(4,), V=(4, 3))


@entry("sequences", x=(3, 3), y=(4,))
def rnn_cell():
    """nn.RNNCell in a loop."""

    def forward(self, x):
        h = self.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            h = self.cell(x[:, t], h)
        return h

    return Made(forward, cell=nn.RNNCell(3, 4))


@entry("sequences", inputs=lambda n: (rand(n, 4, seed=1), rand(n, 3, seed=2)), y=(3,))
def gru_cell():
    """nn.GRUCell, its state an input."""
    return nn.GRUCell(4, 3)


@entry("sequences", x=(3, 3), y=(4,))
def rnn_module():
    """nn.RNN of two layers, batch first, from its own zero state."""
    rnn = nn.RNN(3, 4, num_layers=2, batch_first=True)
    return Made(lambda m, x: m.rnn(x)[0][:, -1], rnn=rnn)


def lengths(n: int, most: int) -> Tensor:
    """Lengths of n sequences, from 1 to `most`."""
    return 1 + ints(n, high=most, seed=3)


@entry(
    "sequences",
    inputs=lambda n: (rand(n, 5, 3, seed=7), lengths(n, 5).sort(descending=True).values),
    y=(2,),
)
def packed_lstm():
    """nn.LSTM over packed sequences, sorted by length; the last state of each."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0][-1])

    return Made(forward, rnn=nn.LSTM(3, 4), head=nn.Linear(4, 2))


@entry("sequences", inputs=lambda n: (rand(n, 4, 3, seed=7), lengths(n, 4)), y=(4, 2))
def packed_gru():
    """nn.GRU both ways over packed sequences in any order; all of its outputs, padded again."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = self.rnn(packed)
        return self.head(pad_packed_sequence(outputs, True, total_length=x.shape[1])[0])

    return Made(forward, rnn=nn.GRU(3, 2, bidirectional=True), head=nn.Linear(4, 2))


@entry(
    "sequences",
    inputs=lambda n: (rand(4, n, 3, seed=7), lengths(n, 4), rand(4, n, 2), rand(4, n, 3, seed=1)),
    y=(2,),
    options={"batch_axis": (1, 0, 1, 1)},
)
def packed_projected():
    """nn.LSTM of two layers, both ways, projected, over packed sequences; its states are inputs."""

    def forward(self, x, lengths, h, c):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        outputs, (h, _) = self.rnn(packed, (h, c))
        outputs, _ = pad_packed_sequence(outputs, total_length=len(x))
        return outputs.sum(0)[:, :2] + h[-1]

    return Made(forward, rnn=nn.LSTM(3, 3, 2, proj_size=2, bidirectional=True))


@entry(
    "sequences",
    inputs=lambda n: rand(5, n, 4, seed=7),
    y=(3,),
    options={"batch_axis": 1},
)
def time_major():
    """Time comes first, the data second; the prediction has the data first."""
    return Made(
        lambda m, x: m.head(m.body(x).tanh().mean(0)), body=nn.Linear(4, 5), head=nn.Linear(5, 3)
    )


@entry(
    "sequences",
    inputs=lambda n: rand(5, n, 4, seed=7),
    targets=lambda n: rand(5, n, 3, seed=11),
    target_axis=1,
    options={"batch_axis": 1},
)
def time_major_prediction():
    """Time comes first in the prediction, too."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@entry(
    "sequences",
    inputs=lambda n: rand(4, n, seed=7),
    targets=lambda n: rand(3, n, seed=11),
    target_axis=1,
    options={"batch_axis": 1},
)
def data_in_columns():
    """Mathematicians' order: one column for each datum, W x + b."""
    return Made(
        lambda m, x: m.V @ torch.tanh(m.W @ x + m.b[:, None]) + m.c,
        W=(5, 4), b=(5,), V=(3, 5), c=(3, 1),
    )  # fmt: skip


@entry("sequences", inputs=lambda n: ints(n, 5, high=6), y=(3,), loss=CE)
def embedding_head():
    """An embedding, pooled, and a head."""
    return Made(
        lambda m, i: m.head(m.embed(i).mean(1).tanh()),
        embed=nn.Embedding(6, 4),
        head=nn.Linear(4, 3),
    )


@entry("sequences", inputs=lambda n: ints(n, 5, high=6), y=(3,))
def embedding_padding():
    """An embedding with a padding index, which stays as it is."""
    return Made(
        lambda m, i: m.head(m.embed(i).sum(1).tanh()),
        embed=nn.Embedding(6, 4, padding_idx=0),
        head=nn.Linear(4, 3),
    )


@entry("sequences", inputs=lambda n: ints(n, high=6), y=(4,), unshared=True)
def embedding_single():
    """One index for each datum."""
    return Made(lambda m, i: F.embedding(i, m.W).tanh() @ m.V, W=(6, 3), V=(3, 4))


@entry("sequences", inputs=lambda n: ints(n, 4, high=5), y=(5, 4), loss=CE)
def embedding_tied():
    """A language model whose head is its embedding."""

    def forward(self, i):
        h = self.embed(i) + self.pos
        h = h + self.body(h.cumsum(1)).tanh()
        return (h @ self.embed.weight.T).mT

    return Made(forward, embed=nn.Embedding(5, 3), pos=(4, 3), body=nn.Linear(3, 3))


@entry("sequences", inputs=lambda n: ints(n, 4, high=5), y=(5, 4), loss=CE)
def embedding_tied_linear():
    """The same with nn.Linear whose weight is the embedding's, and a bias of its own."""

    def forward(self, i):
        return self.head(self.embed(i).cumsum(1).tanh()).transpose(1, 2)

    model = Made(forward, embed=nn.Embedding(5, 3), head=nn.Linear(3, 5))
    model.head.weight = model.embed.weight
    return model


@entry("sequences", inputs=lambda n: ints(n, 4, high=5), y=(3,))
def learned_positions():
    """Token and position embeddings, the positions expanded over the data."""

    def forward(self, i):
        places = torch.arange(i.shape[1]).expand_as(i)
        return self.head((self.tokens(i) + self.places(places)).tanh().mean(1))

    return Made(forward, tokens=nn.Embedding(5, 3), places=nn.Embedding(4, 3), head=nn.Linear(3, 3))


@entry("sequences", inputs=lambda n: ints(n, 4, high=5), y=(3,))
def positions_without_data():
    """Position embeddings that never see the data, added to what does."""

    def forward(self, i):
        return (self.tokens(i) + self.places(torch.arange(4))).tanh().mean(1)

    return Made(forward, tokens=nn.Embedding(5, 3), places=nn.Embedding(4, 3))


@entry("sequences", inputs=lambda n: ints(n, 4, high=5), y=(3,), expected="refused")
def positions_as_factors():
    """Position embeddings that the data are multiplied by: no datum has a part at the lookup."""

    def forward(self, i):
        return (self.tokens(i) * self.places(torch.arange(4))).tanh().mean(1)

    return Made(forward, tokens=nn.Embedding(5, 3), places=nn.Embedding(4, 3))


def _attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(4, 2, **options)


@entry("sequences", x=(3, 4), y=(3, 4))
def attention_batch_first():
    """nn.MultiheadAttention, batch first, the weights averaged over heads not asked for."""
    return Made(
        lambda m, x: m.attend(x, x, x, need_weights=False)[0], attend=_attention(batch_first=True)
    )


@entry("sequences", x=(3, 4), y=(3,), loss=CE)
def attention_weights():
    """nn.MultiheadAttention, batch first, which also computes the weights."""
    return Made(
        lambda m, x: m.head(m.attend(x, x, x)[0].mean(1)),
        attend=_attention(batch_first=True),
        head=nn.Linear(4, 3),
    )


@entry(
    "sequences",
    inputs=lambda n: rand(3, n, 4, seed=7),
    targets=lambda n: rand(3, n, 4, seed=11),
    target_axis=1,
    options={"batch_axis": 1},
)
def attention_time_first():
    """nn.MultiheadAttention in its own order, time first."""
    return Made(lambda m, x: m.attend(x, x, x)[0], attend=_attention())


@entry("sequences", inputs=lambda n: (rand(n, 2, 4, seed=1), rand(n, 3, 4, seed=2)), y=(2, 4))
def cross_attention():
    """Queries from one sequence, keys and values from another."""
    return Made(
        lambda m, q, kv: m.attend(q, kv, kv, need_weights=False)[0],
        attend=_attention(batch_first=True),
    )


@entry("sequences", inputs=lambda n: (rand(n, 2, 4, seed=1), rand(n, 3, 5, seed=2)), y=(2, 4))
def cross_attention_separate():
    """Keys and values of another width: separate projection weights, no bias."""
    attend = _attention(batch_first=True, kdim=5, vdim=5, bias=False)
    return Made(lambda m, q, kv: m.attend(q, kv, kv)[0], attend=attend)


@entry(
    "sequences",
    inputs=lambda n: (rand(n, 3, 4, seed=1), torch.ones(3, 3, dtype=torch.bool).tril()),
    y=(3, 4),
    options={"batch_axis": (0, None)},
)
def attention_mask():
    """A mask without batch axis."""

    def forward(self, x, mask):
        q, k, v = rearrange(self.qkv(x), "n t (p h d) -> p n h t d", p=3, h=2)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(h.transpose(1, 2).flatten(2))

    return Made(forward, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4))


@entry("sequences", x=(3, 4), y=(3, 4))
def attention_by_hand():
    """Attention by hand with grouped keys, scaled and masked."""

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 2, 2).transpose(1, 2)
        k, v = (p(x).view(n, t, 1, 2).transpose(1, 2).expand(n, 2, t, 2) for p in (self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(2)
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 4))

    bias = {"bias": False}
    return Made(
        forward,
        q=nn.Linear(4, 4, **bias), k=nn.Linear(4, 2, **bias), v=nn.Linear(4, 2, **bias),
        out=nn.Linear(4, 4),
    )  # fmt: skip


def _encoder(train: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    for norm in (layer.norm1, layer.norm2):
        norm.requires_grad_(False)
    return layer.train(train)


@entry("sequences", x=(3, 4), y=(3, 4))
def transformer_train():
    """nn.TransformerEncoderLayer in train mode, its norms frozen."""
    return _encoder(train=True)


@entry("sequences", x=(3, 4), y=(3, 4))
def transformer_eval():
    """nn.TransformerEncoderLayer in eval mode."""
    return _encoder(train=False)


# --- convolutions ---


def _conv_net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


@entry("convolutions", x=(2, 6, 5), y=(3,), loss=CE)
def conv_stride_padding():
    """Strides and padding that differ along the axes, and pooling."""
    return _conv_net(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


@entry("convolutions", x=(2, 6, 6), y=(3, 2, 2))
def conv_dilation():
    """A dilated convolution."""
    return _conv_net(nn.Conv2d(2, 3, 3, dilation=2), nn.Tanh())


@entry("convolutions", x=(4, 4, 4), y=(6,))
def conv_groups():
    """Groups, then the channels shuffled."""
    return _conv_net(
        nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.ChannelShuffle(2),
        nn.Conv2d(6, 6, 1, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@entry("convolutions", x=(3, 4, 4), y=(3,), loss=CE)
def conv_depthwise():
    """Depthwise with a multiplier, then pointwise."""
    return _conv_net(
        nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.ReLU(), nn.Conv2d(6, 3, 1),
        nn.AvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


@entry("convolutions", x=(3, 8), y=(4,))
def conv_1d():
    """One dimension, stride and dilation, causal by padding the past."""
    return Made(
        lambda m, x: m.b(F.pad(m.a(x).tanh(), (4, 0))).mean(-1),
        a=nn.Conv1d(3, 4, 3, stride=2, padding=1),
        b=nn.Conv1d(4, 4, 3, dilation=2),
    )


@entry("convolutions", x=(2, 3, 4, 3), y=(2,), loss=BCE)
def conv_3d():
    """Three dimensions."""
    return _conv_net(
        nn.Conv3d(2, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), nn.Tanh(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(),
    )  # fmt: skip


@entry("convolutions", x=(2, 5, 4), y=(3, 5, 4))
def conv_same():
    """padding='same' with an even kernel and dilation."""
    return _conv_net(nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), nn.Tanh())


@entry("convolutions", x=(2, 4, 5), y=(3, 4, 5))
def conv_circular():
    """Circular and reflected padding."""
    return _conv_net(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    )  # fmt: skip


@entry("convolutions", x=(2, 4, 4), y=(3,))
def conv_functional():
    """F.conv2d with a weight of one's own, stored in another order."""
    return Made(
        lambda m, x: F.conv2d(x, m.W.permute(3, 2, 0, 1), m.b, padding=1).tanh().mean((2, 3)),
        W=(3, 3, 2, 3), b=(3,),
    )  # fmt: skip


@entry("convolutions", x=(4, 4, 2), y=(3,), loss=CE)
def conv_channels_last():
    """Channels last in the data; a residual block."""

    def forward(self, x):
        h = self.stem(x.permute(0, 3, 1, 2))
        h = h + self.b(self.a(h.relu()).relu_())
        return self.head(h.mean((2, 3)))

    return Made(
        forward,
        stem=nn.Conv2d(2, 3, 1), a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 3, 1, bias=False),
        head=nn.Linear(3, 3),
    )  # fmt: skip


@entry("convolutions", x=(1, 4, 4), y=(3,))
def patch_embedding():
    """A vision transformer's patches by a convolution, with positions that are added."""

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.places
        return self.head((tokens + self.mix(tokens).tanh()).mean(1))

    return Made(
        forward,
        patch=nn.Conv2d(1, 4, 2, stride=2), places=(1, 4, 4), mix=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )  # fmt: skip


@entry("convolutions", x=(2, 4, 4), y=(3, 4))
def conv_by_unfold():
    """Patches by F.unfold, then a matrix product from the left."""
    return Made(
        lambda m, x: (m.W.flatten(1) @ F.unfold(x, 2, stride=2) + m.b[:, None]).tanh(),
        W=(3, 2, 2, 2), b=(3,),
    )  # fmt: skip


@entry("convolutions", x=(2, 4, 4), y=(2, 4, 4))
def conv_called_twice():
    """A convolution that is run twice, at two scales."""
    return Made(
        lambda m, x: (
            m.conv(x).tanh() + F.interpolate(m.conv(F.avg_pool2d(x, 2)).sin(), size=(4, 4))
        ),
        conv=nn.Conv2d(2, 2, 3, padding=1),
    )


# --- functions: f(params, x), transforms and gradients inside ---


def _dense(d_in: int, d_out: int) -> dict[str, Tensor]:
    return {"W": 0.5 * torch.randn(d_out, d_in).double(), "b": torch.randn(d_out).double()}


def _mlp(params: Mapping[str, Any], x: Tensor) -> Tensor:
    h = torch.tanh(x @ params["first"]["W"].T + params["first"]["b"])
    return h @ params["second"]["W"].T + params["second"]["b"]


def _mlp_params(d_in: int, d_out: int) -> dict[str, Any]:
    return {"first": _dense(d_in, 4), "second": _dense(4, d_out)}


@entry("functions", x=(4,), y=(3,), loss=CE, unshared=True)
def nested_params():
    """A function of a nested dict of tensors."""
    return _mlp, _mlp_params(4, 3)


@entry("functions", x=(4,), y=(3,), unshared=True)
def by_functional_call():
    """torch.func.functional_call of a module, as a function of its parameters."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    return (lambda p, x: functional_call(module, p, (x,))), params


@entry("functions", inputs=lambda n: {"a": rand(n, 4, seed=1), "b": rand(n, 4, seed=2)}, y=(3,))
def keyword_function():
    """A function with keyword inputs that uses its params twice."""
    return (lambda p, *, a, b: _mlp(p, a) * _mlp(p, b)), _mlp_params(4, 3)


@entry("functions", x=(3, 4), y=(3,))
def tied_params():
    """One tensor under two keys of the dict."""
    W = 0.5 * torch.randn(4, 4).double()
    params = {"in": {"W": W}, "out": {"W": W, "b": torch.randn(4).double()}}

    def f(p, x):
        return (torch.tanh(x @ p["in"]["W"]) @ p["out"]["W"] + p["out"]["b"]).mean(1)[:, :3]

    return f, params


@entry("functions", x=(3,), y=(2,))
def directional_derivative():
    """torch.func.jvp of the network along one direction."""

    def f(params, x):
        direction = torch.ones_like(x)
        value, slope = jvp(partial(_mlp, params), (x,), (direction,))
        return value * slope

    return f, _mlp_params(3, 2)


@entry("functions", x=(2,), y=(1,))
def laplacian():
    """Nested jvp: the Laplacian, for a physics-informed network."""

    def f(params, x):
        net = partial(_mlp, params)

        def second(v):
            return jvp(lambda at: jvp(net, (at,), (v,))[1], (x,), (v,))[1]

        basis = torch.eye(2, dtype=x.dtype)
        return sum(second(e.expand_as(x)) for e in basis)

    return f, _mlp_params(2, 1)


@entry("functions", x=(3,), y=(3,))
def force_by_func_grad():
    """torch.func.grad: the force is minus the gradient of the energy."""
    return (lambda p, x: -grad(lambda at: _mlp(p, at).sum())(x)), _mlp_params(3, 1)


@entry("functions", x=(3,), y=(3,))
def force_by_autograd():
    """torch.autograd.grad with create_graph inside a module."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.net(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return -force

    return Made(forward, net=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))


@entry("functions", x=(4,), y=(3,), unshared=True)
def vmap_over_data():
    """torch.vmap of a function of one datum."""

    def one(params, x):
        h = torch.tanh(params["first"]["W"] @ x + params["first"]["b"])
        return params["second"]["W"] @ h + params["second"]["b"]

    return vmap(one, in_dims=(None, 0)), _mlp_params(4, 3)


@entry("functions", x=(3, 4), y=(3, 3))
def vmap_twice():
    """vmap over the data and, inside, over a sequence."""
    return vmap(vmap(_mlp, (None, 0)), (None, 0)), _mlp_params(4, 3)


@entry("functions", x=(2,), y=(2,))
def vmap_of_grad():
    """vmap(grad(f)), one datum's gradient at a time."""
    return vmap(grad(lambda p, x: _mlp(p, x).sum(), argnums=1), (None, 0)), _mlp_params(2, 1)


@entry("functions", x=(2,), y=(2, 2))
def vmap_of_hessian():
    """vmap(hessian(f)) in the input."""
    return vmap(hessian(lambda p, x: _mlp(p, x).sum(), argnums=1), (None, 0)), _mlp_params(2, 1)


@entry("functions", x=(2,), y=(3, 2))
def vmap_of_jacobian():
    """vmap(jacrev(f)) in the input."""
    return vmap(jacrev(_mlp, argnums=1), (None, 0)), _mlp_params(2, 3)


@entry("functions", x=(4,), y=(3,))
def stacked_layers():
    """A list of layers as stacked tensors, unrolled by a loop over the first axis."""

    def f(params, x):
        for W, b in zip(params["W"], params["b"], strict=True):
            x = torch.tanh(x @ W + b)
        return x @ params["head"]

    params = {
        "W": 0.5 * torch.randn(3, 4, 4).double(),
        "b": torch.randn(3, 4).double(),
        "head": torch.randn(4, 3).double(),
    }
    return f, params


@entry("functions", x=(4,), y=(3,), unshared=True)
def vmap_of_module():
    """vmap over the data of functional_call of a module."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    return vmap(lambda p, x: functional_call(module, p, (x,)), (None, 0)), params


@entry("functions", x=(3, 4), y=(3, 3))
def vmap_of_linear():
    """vmap over the data of F.linear on a sequence, with a bias."""
    params = _dense(4, 3)
    return vmap(lambda p, x: F.linear(x, p["W"], p["b"]).tanh(), (None, 0)), params


@entry("functions", x=(1, 4, 4), y=(2, 3, 3))
def vmap_of_conv():
    """vmap over the data of a convolution of one image."""
    params = {"W": torch.randn(2, 1, 2, 2).double()}
    return vmap(lambda p, x: F.conv2d(x, p["W"]).tanh(), (None, 0)), params


@entry("functions", x=(4,), y=(2, 3))
def ensemble():
    """vmap over the parameters: an ensemble whose members see the same data."""

    def f(params, x):
        members = vmap(lambda W, b: torch.tanh(x @ W.T + b))(params["W"], params["b"])
        return members.transpose(0, 1)

    return f, {"W": torch.randn(2, 3, 4).double(), "b": torch.randn(2, 3).double()}


# --- what is special about autograd or the batch ---


class _Square(torch.autograd.Function):
    """x² with its own, right, derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class _OwnLinear(torch.autograd.Function):
    """x Wᵀ with a backward by hand."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return g @ W, g.T @ x


@entry("special", x=(4,), y=(3,), unshared=True)
def custom_function():
    """A custom autograd.Function as activation, with the derivative that it has anyway."""
    return Made(lambda m, x: m.b(_Square.apply(m.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 3))


@entry("special", x=(4,), y=(3,), unshared=True)
def custom_linear():
    """A linear layer as a custom autograd.Function."""
    return Made(lambda m, x: _OwnLinear.apply(x, m.W).tanh() @ m.V, W=(4, 4), V=(4, 3))


@entry("special", x=(4,), y=(3,), unshared=True)
def custom_derivative():
    """A custom autograd.Function whose derivative is not that of its value."""
    return Made(
        lambda m, x: m.b(StraightThrough.apply(m.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    )


@entry("special", x=(4,), y=(3,), unshared=True)
def custom_derivative_above():
    """The same below all parameters, where its derivative plays no part."""
    return Made(lambda m, x: m.a(StraightThrough.apply(x)).tanh(), a=nn.Linear(4, 3))


@entry("special", x=(4,), y=(3,), unshared=True)
def straight_through_detach():
    """Rounding with a straight-through gradient by detach."""

    def forward(self, x):
        h = self.a(x)
        return self.b(h + (h.round() - h).detach())

    return Made(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 3))


@entry("special", x=(4,), y=(3,))
def detached_part():
    """A branch whose gradient is stopped."""
    return Made(
        lambda m, x: m.b(m.a(x).tanh()) * m.a(x).sin().detach(),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 3),
    )


@entry("special", x=(4,), y=(3,))
def no_grad_part():
    """A branch that runs without gradients, through a layer that is also trained."""

    def forward(self, x):
        with torch.no_grad():
            target = self.a(x).softmax(-1)
        return self.b(self.a(x).tanh()) * target

    return Made(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 3))


@entry("special", x=(4,), y=(3,), reduce=False)
def loop_over_data():
    """A Python loop over the data, which no graph of another batch size can repeat."""
    return Made(
        lambda m, x: torch.stack([m.b(m.a(x[k]).tanh()) for k in range(x.shape[0])]),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 3),
    )


@entry("special", x=(4,), y=(3,), unshared=True)
def size_in_python():
    """The batch size as a number of Python, in the shape of a constant."""

    def forward(self, x):
        ones = torch.ones(int(x.shape[0]), 1, dtype=x.dtype)
        return self.a(torch.cat([x, ones], 1)).tanh() + ones

    return Made(forward, a=nn.Linear(5, 3, bias=False))


@entry("special", x=(4,), y=(3,), unshared=True)
def size_dependent_branch():
    """Another code path for more than four data."""

    def forward(self, x):
        if x.shape[0] > 4:
            return torch.cat([self.a(part) for part in x.split(4)]).tanh()
        return self.a(x).tanh()

    return Made(forward, a=nn.Linear(4, 3))


@entry("special", x=(4,), y=(), unshared=True)
def flat_prediction():
    """A prediction without an axis besides the data's."""
    return Made(lambda m, x: m.b(m.a(x).tanh()).squeeze(-1), a=nn.Linear(4, 3), b=nn.Linear(3, 1))


# --- spellings: ways to write one and the same map ---


@dataclass(frozen=True)
class Spellings:
    """Models that are the same map of the same numbers.

    Attributes:
        W, b: Shapes of the weight and the bias in the common layout; `None` for no bias.
        inputs: n -> a batch of n data.
        prediction: What follows the map, from its output in the common layout.
        targets: n -> their targets.
        members: By name, (W, b) -> a module or (function, params) that holds these numbers.
    """

    W: tuple[int, ...]
    b: tuple[int, ...] | None
    inputs: Callable[[int], Tensor]
    prediction: Callable[[Tensor], Tensor]
    targets: Callable[[int], Tensor]
    members: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def numbers(self) -> tuple[Tensor, ...]:
        """The weight and the bias that all members hold."""
        shapes = [self.W] if self.b is None else [self.W, self.b]
        return tuple(0.7 * rand(*shape, seed=k + 3) for k, shape in enumerate(shapes))

    def places(self) -> tuple[Tensor, ...]:
        """The number of every entry in the common order, from 1, as a weight and a bias."""
        weight = 1 + torch.arange(math.prod(self.W), dtype=F64).view(self.W)
        if self.b is None:
            return (weight,)
        return weight, 1 + weight.numel() + torch.arange(math.prod(self.b), dtype=F64).view(self.b)

    def build(self, member: str) -> tuple[Model, Mapping[str, Any] | None]:
        """A member, followed by the prediction."""
        model, params = _pair(self.members[member](*self.numbers()))
        after = self.prediction
        if isinstance(model, nn.Module):
            return Made(lambda m, x: after(m.map(x)), map=model), None
        return (lambda p, x: after(model(p, x))), params

    def order(self, member: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """For every entry of the named parameters, its place in the common order, and its sign."""
        model, params = _pair(self.members[member](*self.places()))
        if isinstance(model, nn.Module):
            named = {f"map.{name}": p for name, p in model.named_parameters()}
        else:
            named = dict(params)
        places = torch.cat([named[name].detach().flatten() for name in names])
        return places.abs().long() - 1, places.sign()

    def __call__(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """Register a member."""
        self.members[build.__name__] = build
        return build


def _pair(built: Any) -> tuple[Model, Any]:
    return built if isinstance(built, tuple) else (built, None)


def _with(function: Callable[..., Any], **tensors: Tensor) -> Made:
    return Made(function, **{name: nn.Parameter(t.clone()) for name, t in tensors.items()})


def _load(layer: nn.Module, W: Tensor, b: Tensor | None = None) -> nn.Module:
    layer.weight = nn.Parameter(W.clone())
    if b is not None:
        layer.bias = nn.Parameter(b.clone())
    return layer


affine = Spellings(
    W=(3, 4),
    b=(3,),
    inputs=lambda n: rand(n, 5, 4, seed=7),
    prediction=lambda y: y.tanh().mean(1),
    targets=lambda n: rand(n, 3, seed=11),
)


@affine
def module(W, b):
    return _load(nn.Linear(4, 3), W, b)


@affine
def linear(W, b):
    return _with(lambda m, x: F.linear(x, m.W, m.b), W=W, b=b)


@affine
def transposed(W, b):
    return _with(lambda m, x: x @ m.W.T + m.b, W=W, b=b)


@affine
def stored_in_out(W, b):
    return _with(lambda m, x: x @ m.W + m.b, W=W.T.contiguous(), b=b)


@affine
def linear_in_out(W, b):
    return _with(lambda m, x: F.linear(x, m.W.t(), m.b), W=W.T.contiguous(), b=b)


@affine
def addmm_rows(W, b):
    return _with(lambda m, x: torch.addmm(m.b, x.reshape(-1, 4), m.W.t()).view(-1, 5, 3), W=W, b=b)


@affine
def addmm_in_out(W, b):
    return _with(
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.W).unflatten(0, (-1, 5)), W=W.T, b=b
    )


@affine
def time_major_rows(W, b):
    def forward(m, x):
        rows = x.transpose(0, 1).reshape(-1, 4)
        return F.linear(rows, m.W, m.b).view(5, -1, 3).transpose(0, 1)

    return _with(forward, W=W, b=b)


@affine
def transposed_input(W, b):
    return _with(lambda m, x: F.linear(x.transpose(0, 1), m.W, m.b).transpose(0, 1), W=W, b=b)


@affine
def einsum(W, b):
    return _with(lambda m, x: torch.einsum("nti,oi->nto", x, m.W) + m.b, W=W, b=b)


@affine
def einsum_turned(W, b):
    return _with(
        lambda m, x: (torch.einsum("io,nti->ont", m.W, x) + m.b[:, None, None]).permute(1, 2, 0),
        W=W.T, b=b,
    )  # fmt: skip


@affine
def einsum_dots(W, b):
    return _with(lambda m, x: torch.einsum("...i,oi->...o", x, m.W).add(m.b), W=W, b=b)


@affine
def left_product(W, b):
    return _with(lambda m, x: (m.W @ x.mT + m.b[:, None]).mT, W=W, b=b)


@affine
def left_product_of_columns(W, b):
    def forward(m, x):
        return (m.W @ x.reshape(-1, 4).T + m.b.view(3, 1)).T.reshape(-1, 5, 3)

    return _with(forward, W=W, b=b)


@affine
def bmm_expanded(W, b):
    return _with(lambda m, x: torch.bmm(x, m.W.expand(len(x), 4, 3)) + m.b, W=W.T, b=b)


@affine
def bmm_one_group(W, b):
    return _with(
        lambda m, x: torch.bmm(x.reshape(1, -1, 4), m.W.T[None]).view(-1, 5, 3) + m.b, W=W, b=b
    )


@affine
def baddbmm_one_group(W, b):
    return _with(
        lambda m, x: torch.baddbmm(m.b.view(1, 1, 3), x.reshape(1, -1, 4), m.W).view(-1, 5, 3),
        W=W.T[None], b=b,
    )  # fmt: skip


@affine
def conv1d(W, b):
    return Made(lambda m, x: m.conv(x.mT).mT, conv=_load(nn.Conv1d(4, 3, 1), W.unsqueeze(-1), b))


@affine
def conv2d(W, b):
    return _with(
        lambda m, x: F.conv2d(x.mT.unsqueeze(-1), m.W[:, :, None, None], m.b).squeeze(-1).mT,
        W=W, b=b,
    )  # fmt: skip


@affine
def conv_of_length_one(W, b):
    return _with(
        lambda m, x: F.conv1d(x.reshape(-1, 4, 1), m.W, m.b).view(-1, 5, 3), W=W[..., None], b=b
    )


@affine
def whole_image(W, b):
    """A convolution whose kernel is as large as the image."""
    return _with(
        lambda m, x: F.conv2d(x.reshape(-1, 1, 2, 2), m.W, m.b).view(-1, 5, 3),
        W=W.view(3, 1, 2, 2), b=b,
    )  # fmt: skip


@affine
def flat_storage(W, b):
    return _with(lambda m, x: F.linear(x, m.W.view(3, 4), m.b), W=W.flatten(), b=b)


@affine
def three_axes(W, b):
    return _with(lambda m, x: x @ m.W.permute(1, 2, 0).reshape(4, 3) + m.b, W=W.view(3, 2, 2), b=b)


@affine
def two_axes_of_input(W, b):
    return _with(
        lambda m, x: torch.einsum("ntab,oab->nto", x.view(-1, 5, 2, 2), m.W) + m.b,
        W=W.view(3, 2, 2), b=b,
    )  # fmt: skip


@affine
def flipped_rows(W, b):
    return _with(lambda m, x: F.linear(x, m.W.flip(0), m.b.flip(0)), W=W.flip(0), b=b.flip(0))


@affine
def put_together(W, b):
    return _with(
        lambda m, x: F.linear(x, torch.cat([m.W, m.V]), torch.cat([m.b, m.c])),
        W=W[:2], V=W[2:], b=b[:1], c=b[1:],
    )  # fmt: skip


@affine
def columns_put_together(W, b):
    return _with(lambda m, x: x @ torch.cat([m.W, m.V], 1).T + m.b, W=W[:, :1], V=W[:, 1:], b=b)


@affine
def part_of_larger(W, b):
    """Homogeneous coordinates: the bias is a column of the weight, and the input has a one."""
    return _with(lambda m, x: F.pad(x, (0, 1), value=1.0) @ m.W.T, W=torch.cat([W, b[:, None]], 1))


@affine
def one_parameter(W, b):
    """Weight and bias are parts of one parameter."""
    return _with(
        lambda m, x: F.linear(x, m.flat[:12].view(3, 4), m.flat[12:]),
        flat=torch.cat([W.flatten(), b]),
    )


@affine
def unrolled(W, b):
    return _with(
        lambda m, x: torch.stack([F.linear(step, m.W, m.b) for step in x.unbind(1)], 1), W=W, b=b
    )


@affine
def unrolled_products(W, b):
    return _with(lambda m, x: torch.stack([x[:, t] @ m.W + m.b for t in range(5)], 1), W=W.T, b=b)


@affine
def two_calls(W, b):
    """Part of the sequence in one call, the rest in another."""
    return _with(
        lambda m, x: torch.cat([F.linear(x[:, :2], m.W, m.b), F.linear(x[:, 2:], m.W, m.b)], 1),
        W=W, b=b,
    )  # fmt: skip


@affine
def tensordot(W, b):
    return _with(lambda m, x: torch.tensordot(x, m.W, dims=([2], [1])) + m.b, W=W, b=b)


@affine
def inner(W, b):
    return _with(lambda m, x: m.b + torch.inner(x, m.W), W=W, b=b)


@affine
def bias_subtracted(W, b):
    return _with(lambda m, x: x @ m.W.T - m.b, W=W, b=-b)


@affine
def product_subtracted(W, b):
    return _with(lambda m, x: m.b - x @ m.W.T, W=-W, b=b)


@affine
def product_added_with_a_factor(W, b):
    return _with(lambda m, x: torch.add(m.b, x @ m.W.T, alpha=-1), W=-W, b=b)


@affine
def own_function(W, b):
    return _with(
        lambda m, x: _OwnLinear.apply(x.reshape(-1, 4), m.W).view(-1, 5, 3) + m.b, W=W, b=b
    )


@affine
def function(W, b):
    return (lambda p, x: x @ p["W"].T + p["b"]), {"W": W, "b": b}


@affine
def vmap_once(W, b):
    return vmap(lambda p, x: x @ p["W"] + p["b"], (None, 0)), {"W": W.T, "b": b}


@affine
def vmap_of_mv(W, b):
    return vmap(vmap(lambda p, x: p["W"] @ x + p["b"], (None, 0)), (None, 0)), {"W": W, "b": b}


@affine
def slope(W, b):
    """The directional derivative of a map that is affine in its parameters."""

    def f(p, x):
        return jvp(lambda s: s * (x @ p["W"].T + p["b"]), (x.new_ones(()),), (x.new_ones(()),))[1]

    return f, {"W": W, "b": b}


heads = Spellings(
    W=(2, 3, 4),
    b=(2, 3),
    inputs=lambda n: rand(n, 5, 4, seed=7),
    prediction=lambda y: y.sin().mean(1),  # (n, t, h, d)
    targets=lambda n: rand(n, 2, 3, seed=11),
)


@heads
def packed(W, b):
    layer = _load(nn.Linear(4, 6), W.flatten(0, 1), b.flatten())
    return Made(lambda m, x: m.layer(x).view(-1, 5, 2, 3), layer=layer)


@heads
def packed_heads_first(W, b):
    layer = _load(nn.Linear(4, 6), W.flatten(0, 1), b.flatten())
    return Made(
        lambda m, x: m.layer(x).view(-1, 5, 2, 3).transpose(1, 2).contiguous().transpose(1, 2),
        layer=layer,
    )


@heads
def einsum_hdi(W, b):
    return _with(lambda m, x: torch.einsum("nti,hdi->nthd", x, m.W) + m.b, W=W, b=b)


@heads
def einsum_hid(W, b):
    def forward(m, x):
        return (torch.einsum("bsi,hid->bhsd", x, m.W) + m.b[:, None]).transpose(1, 2)

    return _with(forward, W=W.mT, b=b)


@heads
def einsum_ihd(W, b):
    return _with(
        lambda m, x: torch.einsum("bsi,ihd->bshd", x, m.W) + m.b, W=W.permute(2, 0, 1), b=b
    )


@heads
def flattened_ihd(W, b):
    return _with(
        lambda m, x: (x @ m.W.flatten(1)).view(-1, 5, 2, 3) + m.b, W=W.permute(2, 0, 1), b=b
    )


@heads
def conv_of_heads(W, b):
    return _with(
        lambda m, x: F.conv1d(x.mT, m.W.reshape(6, 4, 1), m.b.flatten()).mT.unflatten(-1, (2, 3)),
        W=W, b=b,
    )  # fmt: skip


stack = Spellings(
    W=(2, 3, 4),
    b=(2, 3),
    inputs=lambda n: rand(n, 5, 4, seed=7),
    prediction=lambda y: y.sin().mean(2),  # (n, member, t, d)
    targets=lambda n: rand(n, 2, 3, seed=11),
)


@stack
def one_by_one(W, b):
    def forward(m, x):
        return torch.stack([F.linear(x, W, b) for W, b in zip(m.W, m.b, strict=True)], 1)

    return _with(forward, W=W, b=b)


@stack
def broadcast_stack(W, b):
    return _with(lambda m, x: x.unsqueeze(1) @ m.W + m.b[:, None], W=W.mT, b=b)


@stack
def bmm_of_expanded(W, b):
    def forward(m, x):
        y = torch.bmm(x.flatten(0, 1).expand(2, -1, -1), m.W) + m.b.unsqueeze(1)
        return y.unflatten(1, (-1, 5)).transpose(0, 1)

    return _with(forward, W=W.mT, b=b)


@stack
def members_by_vmap(W, b):
    return (lambda p, x: vmap(lambda q: x @ q["W"].T + q["b"], out_dims=1)(p)), {"W": W, "b": b}


lookup = Spellings(
    W=(6, 3),
    b=None,
    inputs=lambda n: ints(n, 5, high=6, seed=3),
    prediction=lambda y: y.tanh().mean(1),
    targets=lambda n: rand(n, 3, seed=11),
)


@lookup
def embedding_module(W):
    return _load(nn.Embedding(6, 3), W)


@lookup
def embedding_function(W):
    return _with(lambda m, i: F.embedding(i, m.W.T), W=W.T)


@lookup
def one_hot(W):
    return _with(lambda m, i: F.one_hot(i, 6).to(m.W.dtype) @ m.W, W=W)


@lookup
def one_hot_linear(W):
    return _with(lambda m, i: F.linear(F.one_hot(i, 6).double(), m.W), W=W.T)


@lookup
def embedding_of_rows(W):
    return _with(lambda m, i: F.embedding(i.flatten(), m.W).view(-1, 5, 3), W=W)


@lookup
def embedding_unrolled(W):
    return _with(lambda m, i: torch.stack([F.embedding(i[:, t], m.W) for t in range(5)], 1), W=W)


@lookup
def embedding_and_one_hot(W):
    """Part of the sequence by lookup, part by product."""

    def forward(m, i):
        rest = F.one_hot(i[:, 2:], 6).double() @ m.W
        return torch.cat([F.embedding(i[:, :2], m.W), rest], 1)

    return _with(forward, W=W)


patches = Spellings(
    W=(3, 2, 2, 2),
    b=(3,),
    inputs=lambda n: rand(n, 2, 4, 6, seed=7),
    prediction=lambda y: y.tanh().mean((2, 3)),  # (n, c, 2, 3)
    targets=lambda n: rand(n, 3, seed=11),
)


@patches
def conv(W, b):
    return _load(nn.Conv2d(2, 3, 2, stride=2), W, b)


@patches
def conv_stored_otherwise(W, b):
    return _with(
        lambda m, x: F.conv2d(x, m.W.permute(3, 2, 0, 1), m.b, stride=2),
        W=W.permute(2, 3, 1, 0), b=b,
    )  # fmt: skip


@patches
def conv_of_depth_one(W, b):
    return _with(
        lambda m, x: F.conv3d(x.unsqueeze(2), m.W, m.b, stride=(1, 2, 2)).squeeze(2),
        W=W.unsqueeze(2), b=b,
    )  # fmt: skip


@patches
def unfold_and_product(W, b):
    return _with(
        lambda m, x: (m.W.flatten(1) @ F.unfold(x, 2, stride=2) + m.b[:, None]).view(-1, 3, 2, 3),
        W=W,
        b=b,
    )


@patches
def patches_and_linear(W, b):
    def forward(m, x):
        rows = rearrange(x, "n c (h p) (w q) -> n h w (c p q)", p=2, q=2)
        return F.linear(rows, m.W, m.b).permute(0, 3, 1, 2)

    return _with(forward, W=W.flatten(1), b=b)


@patches
def patches_and_einsum(W, b):
    def forward(m, x):
        split = x.unflatten(3, (3, 2)).unflatten(2, (2, 2))
        return torch.einsum("nchpwq,ocpq->nohw", split, m.W) + m.b[:, None, None]

    return _with(forward, W=W, b=b)


grouped = Spellings(
    W=(2, 3, 2),
    b=(2, 3),
    inputs=lambda n: rand(n, 2, 2, 5, seed=7),  # (n, g, i, p)
    prediction=lambda y: y.tanh().mean(-1),  # (n, g, o, p)
    targets=lambda n: rand(n, 2, 3, seed=11),
)


@grouped
def grouped_conv(W, b):
    layer = _load(nn.Conv1d(4, 6, 1, groups=2), W.reshape(6, 2, 1), b.flatten())
    return Made(lambda m, x: m.conv(x.flatten(1, 2)).unflatten(1, (2, 3)), conv=layer)


@grouped
def grouped_einsum(W, b):
    return _with(lambda m, x: torch.einsum("ngip,goi->ngop", x, m.W) + m.b.unsqueeze(-1), W=W, b=b)


@grouped
def grouped_bmm(W, b):
    def forward(m, x):
        rows = x.permute(1, 0, 3, 2).reshape(2, -1, 2)
        return (torch.bmm(rows, m.W.mT) + m.b[:, None]).view(2, -1, 5, 3).permute(1, 0, 3, 2)

    return _with(forward, W=W, b=b)


@grouped
def grouped_baddbmm(W, b):
    def forward(m, x):
        rows = x.permute(1, 0, 3, 2).reshape(2, -1, 2)
        y = torch.baddbmm(m.b, rows, m.W)
        return y.view(2, -1, 5, 3).permute(1, 0, 3, 2)

    return _with(forward, W=W.mT, b=b.unsqueeze(1))


@grouped
def grouped_matmul(W, b):
    return _with(lambda m, x: m.W @ x + m.b, W=W, b=b.unsqueeze(-1))


@grouped
def grouped_by_hand(W, b):
    """One layer for each group, from stacked weights and biases."""

    def forward(m, x):
        return torch.stack([W @ x[:, g] + m.b[g][:, None] for g, W in enumerate(m.W)], 1)

    return _with(forward, W=W, b=b)


@grouped
def grouped_layers(W, b):
    """One module for each group."""
    layers = nn.ModuleList([_load(nn.Linear(2, 3), W[g], b[g]) for g in range(2)])
    return Made(
        lambda m, x: torch.stack([f(x[:, g].mT).mT for g, f in enumerate(m.layers)], 1),
        layers=layers,
    )


SPELLINGS = {
    "affine": affine,
    "heads": heads,
    "stack": stack,
    "lookup": lookup,
    "patches": patches,
    "grouped": grouped,
}
