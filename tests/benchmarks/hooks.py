"""KFAC in a plain loop over module hooks: what one would write for one's own linear and conv nets.

Forward hooks keep the inputs and outputs of the layers. The gradients at all outputs come from one
`torch.autograd.grad` with respect to these, so that no gradient of a weight is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interface import Factors, Slope
from benchmarks.problems import Problem

Sums = dict[str, list[Any]]  # of each layer: Σ x xᵀ, Σ g gᵀ, number of rows


class HookedKFAC:
    """Installs its hooks once; `factors(flavour)` may then be called again and again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in problem.layers.items():
            layer.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            y = _streams(output)
            self.kept[name] = _streams(inputs[0]), y
            return output if output is y else output.like(y)  # goes on with what is kept

        return hook

    def factors(self, flavour: str) -> Factors:
        """A = R Σ x xᵀ and B = (1/#rows) Σ g gᵀ of every layer."""
        sums: Sums = {}
        for x, y in self.problem.batches:
            prediction = self.problem.model(x)
            self._add(sums, vectors(self.problem.loss, prediction, y, flavour), prediction)
        return self._scaled(sums)

    def step(self) -> tuple[Slope, Factors]:
        """Loss, gradients and MC factors of the only batch, from one forward pass."""
        ((x, y),) = self.problem.batches
        prediction = self.problem.model(x)
        loss = self.problem.loss(prediction, y)
        gradients = torch.autograd.grad(loss, self.problem.params, retain_graph=True)
        sums: Sums = {}
        self._add(sums, vectors(self.problem.loss, prediction, y, "mc"), prediction)
        named = dict(zip(self.problem.names, gradients, strict=True))
        return Slope(loss.detach(), named), self._scaled(sums)

    def _scaled(self, sums: Sums) -> Factors:
        R = (2 if isinstance(self.problem.loss, nn.MSELoss) else 1) / self.problem.terms
        return {n: (R * a, b / rows) for n, (a, b, rows) in sums.items()}

    def _add(self, sums: Sums, backpropagated: list[Tensor], prediction: Tensor) -> None:
        outputs = [output for _, output in self.kept.values()]
        for number, vector in enumerate(backpropagated):
            last = number == len(backpropagated) - 1
            gradients = torch.autograd.grad(prediction, outputs, vector, retain_graph=not last)
            for (name, (x, _)), g in zip(self.kept.items(), gradients, strict=True):
                _accumulate(sums, name, _output_rows(g), 1)
                if number == 0:
                    rows = _input_rows(self.problem, self.problem.layers[name], x)
                    _accumulate(sums, name, rows, 0)
                    sums[name][2] += len(rows)
        self.kept.clear()


def _streams(tensor: Any) -> Tensor:
    """The tensor itself; within a forward Laplacian value, slopes and Laplacian together."""
    return getattr(tensor, "streams", tensor)


def _accumulate(sums: Sums, name: str, rows: Tensor, position: int) -> None:
    entry = sums.setdefault(name, [None, None, 0])
    if entry[position] is None:
        entry[position] = rows.mT @ rows
    else:
        entry[position].addmm_(rows.mT, rows)


def _input_rows(problem: Problem, layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs or patches (rows, in), with a one joined where the layer has a bias."""
    x = x.detach()
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    rows = x.reshape(-1, x.shape[-1])
    if problem.joint and layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows


def _output_rows(g: Tensor) -> Tensor:
    g = g.movedim(1, -1) if g.ndim == 4 else g
    return g.reshape(-1, g.shape[-1])


def vectors(loss: nn.Module, prediction: Tensor, y: Tensor, flavour: str) -> list[Tensor]:
    """What the flavour sends back from the prediction, for the sum of all loss terms.

    A term of the squared error is half a square, so that the mean is twice that of the terms.
    """
    prediction = prediction.detach()
    if isinstance(loss, nn.CrossEntropyLoss):
        return _vectors_of_classes(prediction, y, flavour)
    if flavour == "type-2":
        return [_unit(prediction, c) for c in range(prediction.shape[1])]
    return [prediction - y if flavour == "empirical" else torch.randn_like(prediction)]


def _unit(prediction: Tensor, c: int) -> Tensor:
    unit = torch.zeros_like(prediction)
    unit[:, c] = 1
    return unit


def _vectors_of_classes(logits: Tensor, y: Tensor, flavour: str) -> list[Tensor]:
    """Classes are on axis 1."""
    p = logits.softmax(1)
    if flavour == "type-2":
        return [p[:, c : c + 1].sqrt() * _minus_one_at(p, c) for c in range(p.shape[1])]
    if flavour != "empirical":
        y = draw(logits)
    return [p.scatter_add(1, y.unsqueeze(1), -torch.ones_like(p[:, :1]))]


def _minus_one_at(p: Tensor, c: int) -> Tensor:
    moved = p.clone()
    moved[:, c] -= 1
    return moved


def draw(logits: Tensor) -> Tensor:
    """A label for each position, from the model's own distribution over axis 1."""
    p = logits.detach().softmax(1).movedim(1, -1)
    return p.reshape(-1, p.shape[-1]).multinomial(1).view(p.shape[:-1])
