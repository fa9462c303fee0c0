"""Matrix products: linear, addmm, mm, mv, matmul, bmm, baddbmm, einsum, in any orientation."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxkfac.graph.axes import letters
from fxkfac.graph.form import Form, Routes
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten


def rows(ndim: int) -> str:
    """Names for `ndim` row axes."""
    return " ".join(f"r{k}" for k in range(ndim))


@rule(aten.linear.default)
def linear(call: Call, operand: Operand) -> Form:
    """y = x Wᵀ + b, x with any number of row axes."""
    r = rows(call.ndim("input") - 1)
    out = "o" if call.ndim("weight") == 2 else ""  # a 1-D weight is one output without an axis
    if operand.name == "weight":
        return Form(f"{out} i", f"{r} i", f"{r} {out}", call.args["input"])
    if operand.name == "bias":
        return Form("o", "", f"{r} o")
    return Form(f"{r} i", f"{out} i", f"{r} {out}", call.args["weight"])


@rule(aten.mm.default)
def mm(call: Call, operand: Operand) -> Form:
    """y = a b; the parameter may be on either side."""
    if operand.name == "self":
        return Form("o i", "i r", "o r", call.args["mat2"])
    return Form("i o", "r i", "r o", call.args["self"])


@rule(aten.mv.default)
def mv(call: Call, operand: Operand) -> Form:
    """y = A v; the parameter may be the matrix or the vector."""
    if operand.name == "self":
        return Form("o i", "i", "o", call.args["vec"])
    return Form("i", "r i", "r", call.args["self"])


@rule(aten.addmm.default)
def addmm(call: Call, operand: Operand) -> Form:
    """y = β c + α a b."""
    return _added(
        call,
        operand,
        mat1=Form("o i", "i r", "o r", call.args["mat2"]),
        mat2=Form("i o", "r i", "r o", call.args["mat1"]),
    )


def _added(call: Call, operand: Operand, **sides: Form) -> Form:
    """β c + α · (a product): the parameter is c, or one side of the product."""
    if operand.name == "self":
        return broadcast(call, "self", float(call.number("beta")))
    return replace(sides[operand.name], scale=float(call.number("alpha")))


@rule(aten.bmm.default)
def bmm(call: Call, operand: Operand) -> Form:
    """y[g] = a[g] b[g]."""
    if operand.name == "self":
        return Form("g o i", "g i r", "g o r", call.args["mat2"])
    return Form("g i o", "g r i", "g r o", call.args["self"])


@rule(aten._grouped_mm.default)
def grouped_mm(call: Call, operand: Operand) -> Form:
    """y[rows of g] = a[rows of g] b[g]: rows sorted by group, `offs` says where each one ends."""
    other = "self" if operand.name == "mat2" else "mat2"
    if operand.name not in ("self", "mat2") or call.ndim(operand.name) != 3:
        raise NotLinear("the parameter is what the groups' weights multiply")
    if call.ndim(other) == 3:
        return bmm(call, operand)
    x, groups = call.args[other], call.shape(operand.name)[0]
    routes = Routes(call.args["offs"], "r", "chosen", groups, ends=True)
    if operand.name == "mat2":
        return Form("chosen i o", "r i", "r o", x, routes=routes)
    return Form("chosen o i", "i r", "o r", x, routes=routes)


@rule(aten.baddbmm.default)
def baddbmm(call: Call, operand: Operand) -> Form:
    """y[g] = β c[g] + α a[g] b[g]."""
    return _added(
        call,
        operand,
        batch1=Form("g o i", "g i r", "g o r", call.args["batch2"]),
        batch2=Form("g i o", "g r i", "g r o", call.args["batch1"]),
    )


@rule(aten.addbmm.default)
def addbmm(call: Call, operand: Operand) -> Form:
    """y = β c + α Σ_g a[g] b[g]: g is summed over, an in axis."""
    return _added(
        call,
        operand,
        batch1=Form("g o i", "g i r", "o r", call.args["batch2"]),
        batch2=Form("g i o", "g r i", "r o", call.args["batch1"]),
    )


@rule(aten.addmv.default)
def addmv(call: Call, operand: Operand) -> Form:
    """y = β c + α A v."""
    return _added(
        call,
        operand,
        mat=Form("o i", "i", "o", call.args["vec"]),
        vec=Form("i", "r i", "r", call.args["mat"]),
    )


@rule(aten.dot.default, aten.vdot.default)
def dot(call: Call, operand: Operand) -> Form:
    """y = Σ_i a_i b_i."""
    (other,) = (value for name, value in call.args.items() if name != operand.name)
    return Form("i", "i", "", other)


@rule(aten.matmul.default)
def matmul(call: Call, operand: Operand) -> Form:
    """y = a b by NumPy's rules: vectors, matrices, stacks that broadcast.

    A stack of weights has a group axis, as in `bmm`, also where one input is broadcast over it.
    """
    shapes = {"self": call.shape("self"), "other": call.shape("other")}
    depth = len(call.y_shape) - sum(len(s) > 1 for s in shapes.values())
    stack = [f"r{k}" for k in range(depth)]
    axes = {
        name: " ".join([*_stacked(stack, shape, call.y_shape), *(own if len(shape) > 1 else ["i"])])
        for (name, shape), own in zip(shapes.items(), (["p", "i"], ["i", "q"]), strict=True)
    }
    y = [*stack, *["p"] * (len(shapes["self"]) > 1), *["q"] * (len(shapes["other"]) > 1)]
    other = "other" if operand.name == "self" else "self"
    apart = [a for a in stack if a in letters(axes[operand.name]) and a not in letters(axes[other])]
    x = call.args[other]
    return Form(axes[operand.name], axes[other], " ".join(y), x, apart=tuple(apart))


def _stacked(stack: list[str], shape: torch.Size, y_shape: torch.Size) -> list[str]:
    """Names of the stack axes that one operand has; a broadcast one is a unit axis."""
    own = max(len(shape) - 2, 0)
    names = stack[len(stack) - own :]
    sizes = y_shape[len(stack) - own : len(stack)]
    return [n if s == t else "1" for n, s, t in zip(names, shape, sizes, strict=False)]


@rule(aten.einsum.default)
def einsum(call: Call, operand: Operand) -> Form:
    """y = einsum(equation, a, b): one parameter and at most one other tensor."""
    terms, out = _equation(call)
    tensors = call.args["tensors"]
    assert operand.place is not None
    others = [k for k in range(len(tensors)) if k != operand.place]
    if len(others) > 1:
        raise NotLinear("an einsum of three or more tensors; write it as two einsums")
    for axes in [*terms, out]:
        if len(set(axes)) < len(axes):
            raise NotLinear(f"a repeated index in {call.args['equation']!r} takes a diagonal")
    if not others:
        return Form(" ".join(terms[operand.place]), "", " ".join(out))
    x = others[0]
    sizes = [call.shapes[t] for t in tensors]
    named = [_units(term, size, terms, sizes) for term, size in zip(terms, sizes, strict=True)]
    return Form(named[operand.place], named[x], " ".join(out), tensors[x])


def _equation(call: Call) -> tuple[list[list[str]], list[str]]:
    """Axis names of every tensor and of the output, the ellipsis written out."""
    equation = call.args["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    ndims = [len(call.shapes[t]) for t in call.args["tensors"]]
    terms = [_spell(t, n) for t, n in zip(left.split(","), ndims, strict=True)]
    if arrow:
        return terms, _spell(right, len(call.y_shape))
    flat = [a for term in terms for a in term]
    dots = sorted({a for a in flat if a.startswith("e")}, key=lambda a: -int(a[1:]))
    return terms, dots + sorted(a for a in set(flat) - set(dots) if flat.count(a) == 1)


def _spell(term: str, ndim: int) -> list[str]:
    """`...ij` of a 4-D tensor becomes e1 e0 axi axj (the ellipsis is aligned at its right)."""
    before, dots, after = term.partition("...")
    n = ndim - len(before) - len(after)
    ellipsis = [f"e{k}" for k in reversed(range(n))] if dots else []
    return [*(f"ax{c}" for c in before), *ellipsis, *(f"ax{c}" for c in after)]


def _units(
    term: list[str], size: torch.Size, terms: list[list[str]], sizes: list[torch.Size]
) -> str:
    """An axis of length one that broadcasts against a longer one is a unit axis."""
    longest = {
        a: max(s[t.index(a)] for t, s in zip(terms, sizes, strict=True) if a in t) for a in term
    }
    return " ".join(a if n == longest[a] else "1" for a, n in zip(term, size, strict=True))


def broadcast(call: Call, name: str, scale: float = 1.0) -> Form:
    """A parameter that is added to the output, broadcast over the axes it does not have."""
    return Form(aligned(call, name), "", rows(len(call.y_shape)), scale=scale)


def aligned(call: Call, name: str) -> str:
    """The axes of an operand that broadcasts to the output: `1` where it has length one only.

    Where it has all axes of the output, as a table of positions or the biases of an ensemble have,
    one of length one is of rows even where the output's is, as for a single datum.
    """
    shape, y_shape = call.shape(name), call.y_shape
    own = len(y_shape) - len(shape)
    y = rows(len(y_shape)).split()[own:]
    all_axes = own == 0 and len(shape) > 1
    pairs = zip(y, y_shape[own:], shape, strict=True)
    return " ".join("1" if n != m or (all_axes and n == 1) else a for a, m, n in pairs)
