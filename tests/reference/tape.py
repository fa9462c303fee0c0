"""The factors and exact blocks by definition, from a forward pass that is written out by hand.

A reference forward pass writes every layer in its canonical form, y[g, n, s, o] = Σ_i x[g, n, s, i]
W[g, i, o] + b[g, o], with the data on the second axis and everything shared on the third, whatever
the model under test does. From the x and y that it collects the factors follow as defined:

    expand:  A = R Σ_{n s} x̃ x̃ᵀ               B = 1/(N S) Σ_{n s} Σ_c g gᵀ
    reduce:  A = R Σ_n x̂ x̂ᵀ, x̂ = mean_s x̃     B = 1/N Σ_n Σ_c ĝ ĝᵀ, ĝ = Σ_s g

with one backward pass for every datum and every column c of the square root of its loss Hessian.
Rows that are padding are left out of the sums, the means, and N S; a datum without any, of N.

A scale, or a bias by itself, has one copy for every datum. The gradient G of a copy is that
datum's own, and gives the exact block:

    C = R Σ_n Σ_c vec(G) vec(G)ᵀ
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Params = Mapping[str, Tensor]
Layer = tuple[str, int]  # the name of a block, and the place of the term in its sum


@dataclass(frozen=True)
class Use:
    """One use of a layer: x̃ (g, n, s, i), y (g, n, s, o), and which rows are no padding (n, s)."""

    x: Tensor
    y: Tensor
    real: Tensor


@dataclass(frozen=True)
class Loss:
    """What a loss sends back from a prediction.

    Attributes:
        vectors: One for each datum and column of S, in the prediction's shape.
        R: The factor of the reduction.
    """

    vectors: Sequence[Tensor]
    R: float

    @staticmethod
    def at(loss: nn.Module, f: Tensor) -> Loss:
        """At the prediction f (n, ..), for cross-entropy (n, classes, ..)."""
        return Loss(list(columns(loss, f.detach())), loss_factor(loss, f))


@dataclass
class Tape:
    """What a reference forward pass has seen.

    Attributes:
        params: The parameters, as the model stores them.
        n: The number of data.
        uses: The uses of every layer.
        copies: The copies of every parameter that has an exact block, the data first.
    """

    params: Params
    n: int
    uses: dict[Layer, list[Use]] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)

    def layer(
        self,
        name: str,
        x: Tensor,
        W: Tensor,
        b: Tensor | None = None,
        term: int = 0,
        real: Tensor | None = None,
    ) -> Tensor:
        """One use of a layer.

        Args:
            name, term: The block, and the place of this orientation or part in its sum.
            x: (n, i), (n, s, i) or (g, n, s, i).
            W: (i, o), or (g, i, o) beside an x with groups.
            b: (o), or (g, o) beside an x with groups.
            real: Which rows are no padding (n, s); all by default.

        Returns:
            y, with o in the place of i.
        """
        if x.ndim == 2:
            return self.layer(name, x[:, None], W, b, term, real)[:, 0]
        if x.ndim == 3:
            bias = None if b is None else b[None]
            return self.layer(name, x[None], W[None], bias, term, real)[0]
        y = torch.einsum("gnsi,gio->gnso", x, W)
        if b is not None:
            y = y + b[:, None, None]
            x = with_columns(x, 1.0)  # x̃ = (x 1)
        real = torch.ones(x.shape[1:3]) if real is None else real
        self.uses.setdefault((name, term), []).append(Use(x.detach(), y, real.to(x.dtype)))
        return y

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The layer `name.weight`, stored as (out, in), with `name.bias` if there is one."""
        weight = f"{name}.weight"
        return self.layer(weight, x, self.params[weight].T, self.params.get(f"{name}.bias"))

    def own(self, name: str) -> Tensor:
        """A parameter that has an exact block: (n, *shape), a copy for every datum."""
        if name not in self.copies:
            p = self.params[name].detach()
            self.copies[name] = p.expand(self.n, *p.shape).clone().requires_grad_()
        return self.copies[name]

    def factors(self, layer: Layer, f: Tensor, loss: Loss, sharing: str) -> tuple[Tensor, Tensor]:
        """A and B of one layer, with a group axis."""
        uses = self.uses[layer]
        ys = [u.y for u in uses]
        x = torch.cat(_widened([u.x for u in uses]), 2)  # several uses are one more shared axis
        g = torch.stack([torch.cat(gs, 2) for gs in _gradients(f, ys, loss.vectors)])
        real = torch.cat([u.real for u in uses], 1)[..., None]  # (n, s, 1)
        x, g, rows = x * real, g * real, real.sum()
        if sharing == "reduce":
            places = real.sum(1, keepdim=True)
            x, g = x.sum(2, keepdim=True) / places.clamp_min(1), g.sum(3, keepdim=True)
            rows = (places > 0).sum()
        A = loss.R * torch.einsum("gnsi,gnsj->gij", x, x)
        B = torch.einsum("cgnso,cgnsp->gop", g, g) / rows
        return A, B

    def exact(self, name: str, f: Tensor, loss: Loss) -> Tensor:
        """C of one parameter, over its entries in row-major order."""
        copies = [self.copies[name]]
        G = torch.cat([g.reshape(self.n, -1) for (g,) in _gradients(f, copies, loss.vectors)])
        return loss.R * G.T @ G


def with_columns(x: Tensor, *factors: float) -> Tensor:
    """x̃ = (x β ..), where biases are added with factors β: for W̃ = (W b ..) in their place."""
    return torch.cat([x, *(torch.full_like(x[..., :1], β) for β in factors)], -1)


def _widened(xs: Sequence[Tensor]) -> list[Tensor]:
    """Where a bias is added at some uses only, its input is zero at the others."""
    width = max(x.shape[-1] for x in xs)
    return [nn.functional.pad(x, (0, width - x.shape[-1])) for x in xs]


def _gradients(
    f: Tensor, at: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """For every vector v, the gradients of ⟨v, f⟩."""
    for v in vectors:
        yield torch.autograd.grad(
            f, at, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )


def loss_factor(loss: nn.Module, f: Tensor) -> float:
    """R of the definition."""
    positions = f.numel() // (f.shape[1] if isinstance(loss, nn.CrossEntropyLoss) else 1)
    scale = 2.0 if isinstance(loss, nn.MSELoss) else 1.0
    return scale if loss.reduction == "sum" else scale / positions


def columns(loss: nn.Module, f: Tensor) -> Iterator[Tensor]:
    """For every datum and every column of its S: the column in the shape of f."""
    for n, *place in itertools.product(*map(range, f.shape)):
        column = torch.zeros_like(f)
        if isinstance(loss, nn.MSELoss):
            column[(n, *place)] = 1.0  # S = I
        elif isinstance(loss, nn.BCEWithLogitsLoss):
            p = f[(n, *place)].sigmoid()
            column[(n, *place)] = (p * (1 - p)).sqrt()  # S = diag √(p (1 − p))
        else:
            c, site = place[0], tuple(place[1:])
            σ = f[(n, slice(None), *site)].softmax(0)
            S = σ.sqrt().diag() - torch.outer(σ, σ.sqrt())  # S = diag √σ − σ √σᵀ
            column[(n, slice(None), *site)] = S[:, c]
        yield column
