"""Convolutions in one to three dimensions: the input of the einsum is the patches."""

from __future__ import annotations

import torch

from fxkfac.graph.form import Folded, Form, Patches
from fxkfac.graph.rules.registry import Call, NotLinear, Operand, rule

aten = torch.ops.aten


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
def convolution(call: Call, operand: Operand) -> Form:
    """y[n, (g o), p] = Σ_{i k} W[(g o), i, k] · patches[n, (g i), p, k]."""
    if call.args.get("transposed"):
        return transposed_convolution(call, operand)
    batch, places, kernel = _axes(call)
    d = len(places)
    sizes = {"g": int(call.number("groups"))}
    y = " ".join([*batch, "(g o)", *places])
    if operand.name == "bias":
        return Form("(g o)", "", y, sizes=sizes)
    if operand.name == "input":
        raise NotLinear("the parameter is the image that is convolved")
    return Form(
        weight=" ".join(["(g o) i", *kernel]),
        x=" ".join([*batch, "(g i)", *places, *kernel]),
        y=y,
        input=call.args["input"],
        prepare=_patches(call, d),
        sizes=sizes,
    )


@rule(
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def transposed_convolution(call: Call, operand: Operand) -> Form:
    """patches of y[n, (g o), p, k] = Σ_i W[(g i), o, k] · x[n, (g i), p]: y is folded from them."""
    batch, places, kernel = _axes(call)
    d = len(places)
    if operand.name == "bias":
        return Form("o", "", " ".join([*batch, "o", *places]))
    if operand.name == "input":
        raise NotLinear("the parameter is the image that is convolved")
    sizes = tuple(call.shape("weight")[2:])
    padding = tuple((p, p) for p in _tuple(call, "padding", d))
    patches = Patches(sizes, _tuple(call, "stride", d), padding, _tuple(call, "dilation", d))
    return Form(
        weight=" ".join(["(g i) o", *kernel]),
        x=" ".join([*batch, "(g i)", *places]),
        y=" ".join([*batch, "(g o)", *places, *kernel]),
        input=call.args["input"],
        folded=Folded(patches, tuple(call.shape("input")[-d:])),
        sizes={"g": int(call.number("groups"))},
    )


def _axes(call: Call) -> tuple[list[str], list[str], list[str]]:
    """Names of the batch axis (none for a single image), the places and the kernel's axes."""
    d = call.ndim("weight") - 2
    batch = ["n"] if call.ndim("input") == d + 2 else []
    return batch, [f"p{k}" for k in range(d)], [f"k{k}" for k in range(d)]


def _patches(call: Call, d: int) -> Patches:
    kernel = tuple(call.shape("weight")[2:])
    stride, dilation = _tuple(call, "stride", d), _tuple(call, "dilation", d)
    return Patches(kernel, stride, _padding(call, kernel, dilation), dilation)


def _padding(
    call: Call, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(before, after) along each dimension; `same` puts the odd one behind, as PyTorch does."""
    padding = call.number("padding")
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [n * (k - 1) for n, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in _tuple(call, "padding", len(kernel)))


def _tuple(call: Call, name: str, d: int) -> tuple[int, ...]:
    value = list(call.number(name))
    return tuple(value * d if len(value) == 1 else value)
