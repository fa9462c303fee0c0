"""Random functional models f(params, x): programs of a few lines, drawn by hypothesis.

A drawn model is Python source. Its repr is that source, so a failing example can be copied out and
run; every decision is a draw, so hypothesis makes the source as short as it can.

    def f(p, x):
        W1, b1 = p["W1"], p["b1"]  # (2, 3), (2,)
        h1 = x @ W1.T
        h2 = (h1 + b1).tanh()
        return h2

Shapes are known while drawing. One axis of each value holds the data, maybe together with others:
`Batch(outer, inner)` is an axis of outer · N · inner entries. Nothing mixes different data.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from zoo import ints, rand

LARGEST = 40  # entries of one datum's value, and of a parameter
VOCABULARY = 4

T = TypeVar("T")
Shape = tuple[int, ...]


class Batch(NamedTuple):
    """An axis of outer · N · inner entries, in this order."""

    outer: int = 1
    inner: int = 1


Dims = tuple[int | Batch, ...]


def rest(dims: Dims) -> int:
    """Entries of one datum."""
    return math.prod(d.outer * d.inner if isinstance(d, Batch) else d for d in dims)


def sizes(dims: Dims) -> str:
    """As arguments of `reshape`."""
    return ", ".join("-1" if isinstance(d, Batch) else str(d) for d in dims)


@dataclass(frozen=True, repr=False)
class RandomModel:
    """The source of a model, and what it takes.

    Attributes:
        lines: The body of f.
        params: Shape of every parameter.
        x: Shape of one datum.
        z: Shape of one datum's integers, for models with embeddings.
    """

    lines: tuple[str, ...]
    params: dict[str, Shape]
    x: Shape
    z: Shape | None

    @property
    def source(self) -> str:
        arguments = "p, x" if self.z is None else "p, x, z"
        parts = [f"    {n} = p[{n!r}]  # {shape}" for n, shape in self.params.items()]
        return "\n".join([f"def f({arguments}):", *parts, *(f"    {line}" for line in self.lines)])

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        z = "" if self.z is None else f", z: (N, {', '.join(map(str, self.z))}) ints"
        return f"\n# x: (N, {', '.join(map(str, self.x))}){z}\n{self.source}\n"

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        name = f"<random model {abs(hash(self.source))}>"
        source = self.source + "\n"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(source, name, "exec"), scope)
        return scope["f"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        shapes = enumerate(self.params.items())
        return {name: 0.7 * rand(*shape, seed=k + 1) for k, (name, shape) in shapes}

    def inputs(self, n: int) -> Any:
        x = rand(n, *self.x, seed=100)
        return x if self.z is None else (x, ints(n, *self.z, high=VOCABULARY, seed=101))

    def data(self, n: int) -> tuple[Any, Tensor]:
        inputs = self.inputs(n)
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        # copies: a model that writes into its input must not write into ours
        prediction = self.function(self.tensors, *(a.clone() for a in arguments))
        return inputs, rand(*prediction.shape, seed=102)


@dataclass(frozen=True)
class Value:
    """A variable of the program; `storage` is shared by its views."""

    name: str
    dims: Dims
    storage: int

    def plain(self) -> list[int]:
        return [k for k, d in enumerate(self.dims) if not isinstance(d, Batch)]

    @property
    def batch(self) -> int:
        return next(k for k, d in enumerate(self.dims) if isinstance(d, Batch))

    def with_axis(self, axis: int, *new: int | Batch) -> Dims:
        dims = list(self.dims)
        dims[axis : axis % len(dims) + 1] = new
        return tuple(dims)


@dataclass
class Draft:
    """A program while it is drawn."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    lines: list[str] = field(default_factory=list)
    params: dict[str, Shape] = field(default_factory=dict)
    weights: dict[str, Shape] = field(default_factory=dict)  # parameters and views of them
    values: list[Value] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)  # storages that must not be written to
    z: Shape | None = None

    # --- draws ---

    def pick(self, options: Iterable[T]) -> T:
        return self.draw(st.sampled_from(list(options)))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def size(self, largest: int = 3) -> int:
        """Two most often: an axis of length one says less."""
        return self.pick([n for n in (2, 3, 2, 1, 4) if n <= largest] or [1])

    def order(self, items: Sequence[T]) -> list[T]:
        return self.draw(st.permutations(items)) if len(items) > 1 else list(items)

    # --- lines ---

    def new(self, expression: str, dims: Dims, *read: Value, view: bool = False) -> Value:
        """Assign to a new variable; a view keeps its storage."""
        name = f"h{len(self.values)}"
        self.lines.append(f"{name} = {expression}")
        self.consumed |= {v.name for v in read}
        if not view:
            self.saved |= {v.storage for v in read}
        storage = read[0].storage if view else len(self.values)
        value = Value(name, dims, storage)
        self.values.append(value)
        return value

    # --- parameters and their views ---

    def fresh(self, shape: Shape) -> str:
        name = f"{'b' if len(shape) == 1 else 'W'}{len(self.params) + 1}"
        self.params[name] = self.weights[name] = shape
        return name

    def plain_weight(self, shape: Shape) -> str:
        known = [name for name, s in self.weights.items() if s == shape]
        return self.pick([*known, ""]) or self.fresh(shape) if known else self.fresh(shape)

    def weight(self, *shape: int, depth: int = 2) -> str:
        """An expression of this shape, made of parameters through views."""
        kinds = {name: kind for name, kind in WEIGHTS.items() if kind.fits(self, shape)}
        if depth == 0 or not kinds or self.pick([0, 1, 2]) < 1:
            return self.plain_weight(shape)
        expression = WEIGHTS[self.pick(kinds)].make(self, shape, depth - 1)
        if self.flag():
            return expression
        name = f"v{len(self.weights) + 1}"
        self.lines.append(f"{name} = {expression}")
        self.weights[name] = shape
        return name


# --- views of parameters: each makes `shape` of something else ---


class Kind(NamedTuple):
    fits: Callable[[Draft, Shape], bool]
    make: Callable[[Draft, Shape, int], str]


WEIGHTS: dict[str, Kind] = {}


def weight_kind(
    fits: Callable[[Draft, Shape], bool] = lambda d, s: True,
) -> Callable[[Callable[[Draft, Shape, int], str]], None]:
    def register(make: Callable[[Draft, Shape, int], str]) -> None:
        WEIGHTS[make.__name__] = Kind(fits, make)

    return register


def grown(shape: Shape, axis: int, by: int) -> Shape:
    return (*shape[:axis], shape[axis] + by, *shape[axis + 1 :])


@weight_kind(lambda d, s: len(s) == 2)
def turned(d: Draft, shape: Shape, depth: int) -> str:
    inner = d.weight(*shape[::-1], depth=depth)
    return inner + d.pick([".T", ".t()", ".transpose(0, 1)", ".mT", ".permute(1, 0)"])


@weight_kind(lambda d, s: len(s) > 2)
def permuted(d: Draft, shape: Shape, depth: int) -> str:
    order = d.order(range(len(shape)))
    before = [0] * len(shape)
    for to, source in enumerate(order):
        before[source] = shape[to]
    return f"{d.weight(*before, depth=depth)}.permute({', '.join(map(str, order))})"


@weight_kind()
def reshaped(d: Draft, shape: Shape, depth: int) -> str:
    flat = (math.prod(shape),)
    before = d.pick([flat, (1, *shape), (*shape, 1), (1, *flat)])
    inner = d.weight(*before, depth=depth)
    call = "view" if inner in d.params and d.flag() else "reshape"
    return f"{inner}.{call}({', '.join(map(str, shape))})"


@weight_kind(lambda d, s: any(larger(d, s)))
def part_of_known(d: Draft, shape: Shape, depth: int) -> str:
    """Another part of what is used elsewhere."""
    name, axis = d.pick(larger(d, shape))
    start = d.draw(st.integers(0, d.weights[name][axis] - shape[axis]))
    return f"{name}[{':, ' * axis}{start}:{start + shape[axis]}]"


def larger(d: Draft, shape: Shape) -> list[tuple[str, int]]:
    found = []
    for name, s in d.weights.items():
        if len(s) == len(shape):
            differ = [k for k in range(len(s)) if s[k] != shape[k]]
            if len(differ) == 1 and s[differ[0]] > shape[differ[0]]:
                found.append((name, differ[0]))
    return found


@weight_kind()
def sliced(d: Draft, shape: Shape, depth: int) -> str:
    axis, before = d.pick(range(len(shape))), ":, "
    more, n = d.size(2), shape[axis]
    kind = d.pick(["from", "to", "narrow", "step", "split", "select"])
    if kind == "step":
        inner = d.weight(*grown(shape, axis, n - 1), depth=depth)
        return f"{inner}[{before * axis}::2]"
    if kind == "select":
        inner = d.weight(*shape[:axis], more + 1, *shape[axis:], depth=depth)
        return f"{inner}[{before * axis}{d.pick([more, 0])}]"
    inner = d.weight(*grown(shape, axis, more), depth=depth)
    return {
        "from": f"{inner}[{before * axis}{more}:]",
        "to": f"{inner}[{before * axis}:{n}]",
        "narrow": f"{inner}.narrow({axis}, {more}, {n})",
        "split": f"{inner}.split([{more}, {n}], dim={axis})[1]",
    }[kind]


@weight_kind(lambda d, s: max(s) > 1)
def joined(d: Draft, shape: Shape, depth: int) -> str:
    axis = d.pick([k for k, s in enumerate(shape) if s > 1])
    one = (*shape[:axis], *shape[axis + 1 :])
    if one and shape[axis] == 2 and d.flag():
        parts = [d.weight(*one, depth=depth) for _ in range(2)]
        return f"torch.stack([{', '.join(parts)}], dim={axis})"
    n = d.size(shape[axis] - 1)
    parts = [d.weight(*grown(shape, axis, by), depth=depth) for by in (-n, n - shape[axis])]
    return f"torch.cat([{', '.join(parts)}], dim={axis})"


@weight_kind(lambda d, s: max(s) > 1)
def expanded(d: Draft, shape: Shape, depth: int) -> str:
    axis = d.pick([k for k, s in enumerate(shape) if s > 1])
    inner = d.weight(*grown(shape, axis, 1 - shape[axis]), depth=depth)
    if d.flag():
        return f"{inner}.expand({', '.join(map(str, shape))})"
    times = [shape[k] if k == axis else 1 for k in range(len(shape))]
    return f"{inner}.repeat({', '.join(map(str, times))})"


@weight_kind()
def scaled(d: Draft, shape: Shape, depth: int) -> str:
    return d.pick(["({} * 0.5)", "(1.7 * {})", "({} / 3)", "(-{})"]).format(
        d.weight(*shape, depth=depth)
    )


@weight_kind()
def moved(d: Draft, shape: Shape, depth: int) -> str:
    inner, axis = d.weight(*shape, depth=depth), d.pick(range(len(shape)))
    return inner + d.pick([f".flip({axis})", f".roll(1, {axis})", ".contiguous()", ".clone()"])


# --- steps: each takes a value and makes a new one ---


class Step(NamedTuple):
    fits: Callable[[Draft, Value], bool]
    make: Callable[[Draft, Value], object]


LINEAR: dict[str, Step] = {}
OTHER: dict[str, Step] = {}


def step(
    steps: dict[str, Step], fits: Callable[[Draft, Value], bool] = lambda d, h: True
) -> Callable[[Callable[[Draft, Value], object]], None]:
    def register(make: Callable[[Draft, Value], object]) -> None:
        steps[make.__name__] = Step(fits, make)

    return register


def last_is_plain(d: Draft, h: Value) -> bool:
    return len(h.dims) > 1 and not isinstance(h.dims[-1], Batch)


def width(d: Draft, dims: Dims) -> int:
    """Of a new axis besides these."""
    return d.size(max(1, min(4, LARGEST // rest(dims))))


@step(LINEAR, last_is_plain)
def linear(d: Draft, h: Value) -> None:
    i, o = h.dims[-1], width(d, h.dims[:-1])
    kinds = ["linear", "linear with bias", "@", "@ T", "einsum", "matmul"]
    kind = d.pick([*kinds, "addmm", "mm"] if len(h.dims) == 2 else kinds)
    dims = (*h.dims[:-1], o)
    if kind == "linear":
        d.new(f"F.linear({h.name}, {d.weight(o, i)})", dims, h)
    elif kind == "linear with bias":
        d.new(f"F.linear({h.name}, {d.weight(o, i)}, {d.weight(o)})", dims, h)
    elif kind == "@":
        d.new(f"{h.name} @ {d.weight(i, o)}", dims, h)
    elif kind == "@ T":
        d.new(f"{h.name} @ {d.weight(o, i)}.T", dims, h)
    elif kind == "einsum":
        d.new(f'torch.einsum("...i,oi->...o", {h.name}, {d.weight(o, i)})', dims, h)
    elif kind == "addmm":
        d.new(f"torch.addmm({d.weight(o)}, {h.name}, {d.weight(i, o)})", dims, h)
    else:
        d.new(f"torch.{kind}({h.name}, {d.weight(i, o)})", dims, h)


@step(LINEAR, last_is_plain)
def vector(d: Draft, h: Value) -> None:
    d.new(f"{h.name} @ {d.weight(h.dims[-1])}", h.dims[:-1], h)


@step(LINEAR, lambda d, h: len(h.dims) > 1 and not isinstance(h.dims[-2], Batch))
def from_the_left(d: Draft, h: Value) -> None:
    o = width(d, h.with_axis(-2))
    dims = h.with_axis(len(h.dims) - 2, o)
    d.new(f"{d.weight(o, h.dims[-2])} @ {h.name}", dims, h)


@step(LINEAR)
def einsum(d: Draft, h: Value) -> None:
    letters = "abcdef"[: len(h.dims)]
    of_h = dict(zip(letters, h.dims, strict=True))
    roles = {
        c: "row" if isinstance(n, Batch) else d.pick(["in", "row", "group", "summed"])
        for c, n in of_h.items()
    }
    kept = [c for c, role in roles.items() if role in ("row", "group")]
    of_w = {c: of_h[c] for c, role in roles.items() if role in ("in", "group")}
    dims = {c: of_h[c] for c in kept}
    for c in "op"[: d.pick([1, 0, 2]) if of_w else 1]:
        of_w[c] = dims[c] = width(d, tuple(dims.values()))
    w, y = d.order(list(of_w)), d.order(list(dims))
    pair = [(letters, h.name), ("".join(w), d.weight(*(of_w[c] for c in w)))]
    (a, x), (b, v) = pair[::-1] if d.flag() else pair
    d.new(f'torch.einsum("{a},{b}->{"".join(y)}", {x}, {v})', tuple(dims[c] for c in y), h)


@step(LINEAR, lambda d, h: len(h.dims) >= 3 and last_is_plain(d, h))
def stacked(d: Draft, h: Value) -> None:
    """Matrix products with one matrix for each entry of an axis."""
    g, i, o = h.dims[-3], h.dims[-1], width(d, h.dims[:-1])
    dims = (*h.dims[:-1], o)
    if isinstance(g, Batch):
        w = f"{d.weight(1, i, o)}.expand({h.name}.shape[-3], {i}, {o})"
    else:
        w = d.weight(g, i, o)
    kind = d.pick(["matmul", "bmm", "baddbmm"]) if len(h.dims) == 3 else "matmul"
    if kind == "baddbmm":
        b = d.weight(*d.pick([(1, 1, o), (1, o), (o,)] if isinstance(g, Batch) else [(g, 1, o)]))
        d.new(f"torch.baddbmm({b}, {h.name}, {w})", dims, h)
    else:
        d.new(f"torch.{kind}({h.name}, {w})", dims, h)


def is_picture(d: Draft, h: Value) -> bool:
    return len(h.dims) in (3, 4) and h.batch == 0


@step(LINEAR, is_picture)
def convolution(d: Draft, h: Value) -> None:
    _, c, *lengths = h.dims
    settings = [
        (k, s, p, r, tuple((n + 2 * p - r * (k - 1) - 1) // s + 1 for n in lengths))
        for k in (1, 2, 3)
        for s in (1, 2)
        for p in (0, 1, 2)
        for r in (1, 2)
        if all(n + 2 * p > r * (k - 1) for n in lengths)
    ]
    small = [s for s in settings if math.prod(s[4]) <= LARGEST // 3]
    kernel, stride, padding, dilation, after = d.pick(small)
    groups = d.pick([g for g in (1, 2, 3) if c % g == 0])
    o = groups * d.size(2)
    w = d.weight(o, c // groups, *[kernel] * len(lengths))
    bias = d.weight(o) if d.flag() else "None"
    options = f"{stride}, {padding}, {dilation}, {groups}"
    call = f"F.conv{len(lengths)}d({h.name}, {w}, {bias}, {options})"
    d.new(call, (h.dims[0], o, *after), h)


@step(LINEAR, last_is_plain)
def bias(d: Draft, h: Value) -> None:
    """With all plain axes from some axis on, some of them of length one."""
    first = d.pick(range(h.batch + 1, len(h.dims)))
    shape = [n if d.pick([1, 1, 0]) else 1 for n in h.dims[first:]]
    b = d.weight(*shape)
    d.new(d.pick(["{} + {}", "{} - {}", "torch.add({}, {})"]).format(h.name, b), h.dims, h)


@step(LINEAR)
def embedding(d: Draft, h: Value) -> None:
    if d.z is None:
        d.z = tuple(d.size() for _ in range(d.pick([1, 0, 2])))
    o = d.size()
    d.new(f"F.embedding(z, {d.weight(VOCABULARY, o)})", (Batch(), *d.z, o))


@step(LINEAR, last_is_plain)
def residual(d: Draft, h: Value) -> None:
    i = h.dims[-1]
    g = d.pick(["torch.tanh", "torch.sigmoid", "F.softplus"])
    op = d.pick(["+", "*"])
    d.new(f"{h.name} {op} {g}({h.name} @ {d.weight(i, i)})", h.dims, h)


@step(OTHER)
def nonlinear(d: Draft, h: Value) -> None:
    g = d.pick(["torch.tanh", "torch.sigmoid", "F.softplus", "F.relu"])
    made = d.new(f"{g}({h.name})", h.dims, h)
    d.saved.add(made.storage)  # most of them need their output


@step(OTHER)
def number(d: Draft, h: Value) -> None:
    d.new(d.pick(["{} * 0.5", "{} + 1", "{} ** 2", "{} / 3"]).format(h.name), h.dims, h)


@step(OTHER, lambda d, h: h.storage not in d.saved and bool(d.params))
def in_place(d: Draft, h: Value) -> None:
    same = [v for v in d.values if v.dims == h.dims and v.storage != h.storage]
    calls = ["add_(0.5)", "mul_(1.3)", "relu_()", "tanh_()"]
    where = ""
    if h.plain() and last_is_plain(d, h) and d.flag():
        where = "[..., :1]"
    elif same:
        other = d.pick(same)
        calls.insert(0, f"add_({other.name})")
    call = d.pick(calls)
    if call.endswith("()"):
        d.saved.add(h.storage)
    if where or d.flag():
        d.lines.append(f"{h.name}{where}.{call}")
    else:
        d.new(f"{h.name}.{call}", h.dims, h, view=True)


@step(OTHER, lambda d, h: len(h.dims) > 1)
def transpose(d: Draft, h: Value) -> None:
    a, b = d.order(range(len(h.dims)))[-2:]
    dims = list(h.dims)
    dims[a], dims[b] = dims[b], dims[a]
    d.new(f"{h.name}.transpose({a}, {b})", tuple(dims), h, view=True)


@step(OTHER, lambda d, h: len(h.dims) > 2)
def permute(d: Draft, h: Value) -> None:
    order = d.order(range(len(h.dims)))
    call = f"{h.name}.permute({', '.join(map(str, order))})"
    d.new(call, tuple(h.dims[k] for k in order), h, view=True)


@step(OTHER, lambda d, h: len(h.dims) > 1)
def flatten(d: Draft, h: Value) -> None:
    """Two neighbours become one axis, maybe with the data in it."""
    k = d.pick(range(len(h.dims) - 1))
    a, b = h.dims[k : k + 2]
    if isinstance(a, Batch):
        one: int | Batch = Batch(a.outer, a.inner * b)
    else:
        one = Batch(a * b.outer, b.inner) if isinstance(b, Batch) else a * b
    dims = (*h.dims[:k], one, *h.dims[k + 2 :])
    call = d.pick([f"flatten({k}, {k + 1})", f"reshape({sizes(dims)})"])
    d.new(f"{h.name}.{call}", dims, h, view=True)


@step(OTHER, lambda d, h: any(n == 4 or (isinstance(n, Batch) and n != (1, 1)) for n in h.dims))
def unflatten(d: Draft, h: Value) -> None:
    fits = [k for k, n in enumerate(h.dims) if n == 4 or (isinstance(n, Batch) and n != (1, 1))]
    k = d.pick(fits)
    n = h.dims[k]
    if not isinstance(n, Batch):
        new: Dims = (2, 2)
    elif n.outer > 1:
        new = (n.outer, Batch(1, n.inner))
    else:
        new = (Batch(), n.inner)
    dims = h.with_axis(k, *new)
    call = d.pick([f"reshape({sizes(dims)})", f"unflatten({k}, ({sizes(new)}))"])
    d.new(f"{h.name}.{call}", dims, h, view=True)


@step(OTHER, lambda d, h: bool(h.plain()))
def part(d: Draft, h: Value) -> None:
    axis = d.pick(h.plain())
    n, before = h.dims[axis], ":, " * axis
    start = d.draw(st.integers(0, n - 1))
    kind = d.pick(["slice", "select", "step", "flip", "roll", "split"])
    if kind == "select":
        d.new(f"{h.name}[{before}{start}]", h.with_axis(axis), h, view=True)
    elif kind == "slice":
        d.new(f"{h.name}[{before}{start}:]", h.with_axis(axis, n - start), h, view=True)
    elif kind == "step":
        dims = h.with_axis(axis, -(-(n - start) // 2))
        d.new(f"{h.name}[{before}{start}::2]", dims, h, view=True)
    elif kind == "split" and n > 1:
        d.new(f"{h.name}.split(1, {axis})[{start}]", h.with_axis(axis, 1), h, view=True)
        d.saved.add(h.storage)  # autograd forbids writing to one of many views
    else:
        call = f"flip({axis})" if kind == "flip" else f"roll(1, {axis})"
        d.new(f"{h.name}.{call}", h.dims, h, view=True)


@step(OTHER, lambda d, h: len(h.dims) < 5)
def ones(d: Draft, h: Value) -> None:
    """A new axis of length one, maybe expanded."""
    axis = d.pick(range(len(h.dims) + 1))
    dims = (*h.dims[:axis], 1, *h.dims[axis:])
    if 2 * rest(dims) <= LARGEST and d.flag():
        wide = (*h.dims[:axis], 2, *h.dims[axis:])
        call = f"{h.name}.unsqueeze({axis}).expand({sizes(wide)})"
        d.saved.add(h.storage)
        d.new(call, wide, h, view=True)
    else:
        d.new(f"{h.name}.unsqueeze({axis})", dims, h, view=True)


@step(OTHER, lambda d, h: 1 in h.dims)
def squeeze(d: Draft, h: Value) -> None:
    axis = d.pick([k for k, n in enumerate(h.dims) if n == 1])
    d.new(f"{h.name}.squeeze({axis})", h.with_axis(axis), h, view=True)


@step(OTHER, lambda d, h: bool(h.plain()))
def mean(d: Draft, h: Value) -> None:
    axis = d.pick(h.plain())
    keep = d.flag()
    op = d.pick(["mean", "sum"])
    dims = h.with_axis(axis, 1) if keep else h.with_axis(axis)
    d.new(f"{h.name}.{op}({axis}{', keepdim=True' if keep else ''})", dims, h)


def alike(d: Draft, h: Value) -> list[Value]:
    return [v for v in d.values[::-1] if v.dims == h.dims]


@step(OTHER, lambda d, h: len(alike(d, h)) > 1)
def elementwise(d: Draft, h: Value) -> None:
    other = d.pick([v for v in alike(d, h) if v.name != h.name])
    op = d.pick(["+", "*"])
    d.new(f"{h.name} {op} {other.name}", h.dims, h, other)


@step(OTHER, lambda d, h: bool(h.plain()) and 2 * rest(h.dims) <= LARGEST)
def join(d: Draft, h: Value) -> None:
    other = d.pick(alike(d, h))
    if d.flag():
        axis = d.pick(h.plain())
        dims, op = h.with_axis(axis, 2 * h.dims[axis]), "cat"
    else:
        axis = d.pick(range(len(h.dims) + 1))
        dims, op = (*h.dims[:axis], 2, *h.dims[axis:]), "stack"
    d.new(f"torch.{op}([{h.name}, {other.name}], dim={axis})", dims, h, other)


# --- the whole ---


def advance(d: Draft, steps: dict[str, Step]) -> None:
    h = d.pick([d.values[-1]] * 3 + d.values[::-1])  # mostly a chain
    fitting = [name for name, s in steps.items() if s.fits(d, h)]
    fitting += [name for name in ("elementwise", "in_place") if name in fitting] * 2
    if len(h.dims) > 5:
        fitting = ["mean"]
    if fitting:
        steps.get(fitting[0] if len(fitting) == 1 else d.pick(fitting), OTHER["mean"]).make(d, h)


def prediction(d: Draft, h: Value) -> str:
    """The data first, the rest in one axis."""
    n = h.dims[h.batch]
    expression, axis = h.name, h.batch
    if n != Batch():
        apart = h.with_axis(h.batch, n.outer, Batch(), n.inner)
        expression, axis = f"{expression}.reshape({sizes(apart)})", axis + 1
        count = len(apart)
    else:
        count = len(h.dims)
    if axis:
        expression += f".movedim({axis}, 0)"
    return f"{expression}.unsqueeze(-1)" if count == 1 else f"{expression}.flatten(1)"


@st.composite
def random_models(draw: Callable[[st.SearchStrategy[Any]], Any], most: int = 6) -> RandomModel:
    """A model of at most so many steps; at least the first enters a parameter."""
    d = Draft(draw)
    x = tuple(d.size() for _ in range(d.pick([1, 2, 3])))
    d.values.append(Value("x", (Batch(), *x), 0))
    d.saved.add(0)
    advance(d, LINEAR)
    for _ in range(d.pick(range(most))):
        advance(d, d.pick([OTHER, LINEAR]))
    last = d.values[-1]
    loose = [v for v in d.values[1:-1] if v.name not in d.consumed]
    if loose and d.pick([True, True, True, False]):  # else they are dead code
        parts = ", ".join(prediction(d, v) for v in [*loose, last])
        d.lines.append(f"return torch.cat([{parts}], dim=1)")
    elif last.dims[0] == Batch() and d.flag():
        d.lines.append(f"return {last.name}")
    else:
        d.lines.append(f"return {prediction(d, last)}")
    return RandomModel(tuple(d.lines), d.params, x, d.z)
