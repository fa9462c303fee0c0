"""Cross-entropy as a likelihood in closed form. Paper, Examples 2, 4, 7, 12 and 14.

In: logits with a class axis, and class indices or class probabilities, with every option that
`nn.CrossEntropyLoss` has. Out: criterion, gradient, S, samples and labels of the categorical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxkfac.errors import DataError, LossError
from fxkfac.isolation import generator_on
from fxkfac.likelihoods.base import sum_rows
from fxkfac.likelihoods.closed_form import ClosedForm
from fxkfac.likelihoods.targets import require_floating_like, require_tensors
from fxkfac.precision import accurate, accurate_dtype

MANY_CLASSES = 512  # from which on a block of them is drawn first


class Categorical(ClosedForm):
    """nn.CrossEntropyLoss: c = -Σ_k w_k q_k log σ_k, with σ = softmax(f) along the class axis.

    q is the target as probabilities: one-hot or soft, mixed with the uniform distribution by
    label smoothing, and zero at ignored positions. Every label position is a site.

    Paper, Examples 2 and 4; the Hessian in f is diag σ - σσᵀ (Example 7) without weights.
    """

    def __init__(
        self,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ):
        if weight is not None and (weight < 0).any():
            raise LossError(
                f"CrossEntropyLoss has a class weight of {weight.min().item():g}; expected weights "
                "≥ 0, since a negative one makes the loss concave."
            )
        if not 0 <= label_smoothing <= 1:
            raise LossError(f"label_smoothing={label_smoothing}; expected a number from 0 to 1.")
        self.reduction, self.weight = reduction, weight
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def nll(self, prediction: Tensor, target: Tensor) -> Tensor:
        """-Σ w q log σ summed over the label positions of each row, shape [N]. Example 2."""
        f = accurate(prediction)
        target = target.to(f.dtype) if target.is_floating_point() else target
        weight = None if self.weight is None else self.weight.to(f)
        positions = f.shape[:1] + f.shape[2:]
        if f.ndim > 2 and _side_by_side(f):  # rows of memory, which is read twice as fast
            target = _rows(target) if target.is_floating_point() else target.flatten()
            f = _rows(f)
        values = F.cross_entropy(
            f, target, weight, None, self.ignore_index, None, "none", self.label_smoothing
        )
        return sum_rows(values.view(positions) if len(positions) > 1 else values)

    def criterion(self, f: Tensor, y: Tensor) -> Tensor:
        """Σ_n c(f_n, y_n); for a prediction [C], axis 0 is that of the classes."""
        return self.nll(f, y).sum()

    def count(self, f: Tensor, y: Tensor) -> float:
        """The valid label positions, each with its class weight; for soft targets, all of them."""
        if y.is_floating_point():
            return f.numel() / f.shape[_class_axis(f)]
        valid = y != self.ignore_index
        if self.weight is None:
            return float(valid.sum())
        return float(self.weight.to(accurate(f))[y[valid]].sum())

    def ignores(self, y: Tensor) -> bool:
        """Whether a class is `ignore_index`."""
        return not y.is_floating_point() and bool((y == self.ignore_index).any())

    def ignored(self, f: Tensor, y: Tensor) -> Tensor | None:
        """Positions whose class is `ignore_index`."""
        if y.is_floating_point():
            return None
        return (y == self.ignore_index).unsqueeze(_class_axis(f))

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """(Σ_k w_k q_k) σ - w q. Example 14, and weights."""
        axis = _class_axis(f)
        σ = _probabilities(f)
        if y.is_floating_point() or self.label_smoothing:
            wq = self._weighted_target(f, y)
            return (wq.sum(axis, keepdim=True) * σ - wq).to(f.dtype)
        return _residual(σ, y.clamp(0, f.shape[axis] - 1), self._site_weight(f, y)).to(f.dtype)

    def hessian_sqrt(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """S = √w (diag √σ - σ √σᵀ), w = Σ_k w_k q_k. Example 12."""
        axis = _class_axis(f)
        log_σ = accurate(f).log_softmax(axis)
        root_v = (log_σ / 2).exp() * v  # diag(√σ) v
        Sv = root_v - log_σ.exp() * root_v.sum(axis, keepdim=True)
        return (self._site_weight(f, y).sqrt() * Sv).to(v.dtype)

    def hessian_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """√w √σ q_c, with q_c all but one column of the reflection that turns √σ into −e_m.

        S √σ = 0, so that of C columns one is nothing. These are orthogonal to √σ, and therefore
        S q_c = √w diag(√σ) q_c with q_c = e_c − √σ_c (√σ + e_m) / (1 + √σ_m). The class m is the
        most probable one, so that no difference cancels.
        """
        axis = _class_axis(f)
        r = (accurate(f).log_softmax(axis) / 2).exp()  # √σ
        m = r.argmax(axis, keepdim=True)
        u = r.scatter_add(axis, m, torch.ones_like(r))  # √σ + e_m
        scaled = self._site_weight(f, y).sqrt() * r
        for k in range(f.shape[axis] - 1):
            c = k + (m <= k)  # the classes, without m
            q = -u * (r.gather(axis, c) / (1 + r.gather(axis, m)))
            yield (scaled * q.scatter_add_(axis, c, torch.ones_like(r))).to(f.dtype)

    def room(self, f: Tensor) -> Tensor:
        """One number for every position, however many classes there are."""
        return super().room(f.select(_class_axis(f), 0))

    def noise(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in [0, 1)."""
        return self.room(f).uniform_(generator=generator_on(f.device, generator))

    def label(self, f: Tensor, noise: Tensor) -> Tensor:
        """ỹ ~ Categorical(σ) at every position, as class indices. Example 4.

        That is the first class up to which the probabilities add up to more than the noise: never
        one with none.
        """
        return _drawn(_classes_last(_probabilities(f)), noise.unsqueeze(-1)).squeeze(-1)

    def sampled_gradient(self, f: Tensor, y: Tensor, sampled: Tensor) -> Tensor:
        """√w (σ - onehot(ỹ)), so that its expected square is the Hessian, weights included."""
        σ = _probabilities(f)
        return _residual(σ, sampled, self._site_weight(f, y).sqrt()).to(f.dtype)

    def labels(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every class k with σ_k."""
        axis = _class_axis(f)
        σ = _probabilities(f)
        for k, σ_k in enumerate(σ.split(1, axis)):
            yield σ_k, torch.full_like(σ_k.squeeze(axis), k, dtype=torch.int64)

    def event_axes(self, f: Tensor) -> tuple[int, ...]:
        """The class axis."""
        return (_class_axis(f),)

    def validate(self, f: Tensor, y: Tensor) -> None:
        """Targets are class indices (int64) or class probabilities, in the shape torch wants."""
        require_tensors(f, y)
        classes = f.shape[_class_axis(f)]
        if self.weight is not None and self.weight.shape != (classes,):
            raise LossError(
                f"CrossEntropyLoss has class weights of shape {tuple(self.weight.shape)}, but the "
                f"prediction of shape {tuple(f.shape)} has {classes} classes; expected one each."
            )
        if y.is_floating_point():
            self._validate_soft(f, y)
        else:
            self._validate_hard(f, y, classes)

    def _validate_hard(self, f: Tensor, y: Tensor, classes: int) -> None:
        axis = _class_axis(f)
        positions = (*f.shape[:axis], *f.shape[axis + 1 :])
        if y.shape != positions or y.dtype != torch.int64:
            raise DataError(
                f"targets of dtype {y.dtype} and shape {tuple(y.shape)} for CrossEntropyLoss of a "
                f"prediction of shape {tuple(f.shape)}; expected class indices, torch.int64 of "
                f"shape {positions}, or class probabilities, floating of shape {tuple(f.shape)}. "
                f"Classes lie on axis {axis}."
            )
        if torch.equal(y, y.clamp(0, classes - 1)):  # a GPU is waited for once
            return
        wrong = ((y < 0) | (y >= classes)) & (y != self.ignore_index)
        if wrong.any():
            raise DataError(
                f"{int(wrong.sum())} of {y.numel()} targets are no class index, among them "
                f"{y[wrong].unique()[:3].tolist()}; expected 0..{classes - 1}, or ignore_index="
                f"{self.ignore_index}. Renumber the classes, or widen the prediction."
            )

    def _validate_soft(self, f: Tensor, y: Tensor) -> None:
        require_floating_like(f, y, "CrossEntropyLoss with class probabilities")
        if (y < 0).any():
            raise DataError(
                f"a class probability is {y.min().item():g}; expected numbers ≥ 0. For targets in "
                "logits, apply softmax first."
            )
        if self.ignore_index >= 0:
            raise DataError(
                f"targets are class probabilities, for which torch knows no ignore_index, but it "
                f"is {self.ignore_index}. Set the probabilities of ignored positions to zero."
            )

    def _weighted_target(self, f: Tensor, y: Tensor) -> Tensor:
        """W q, like `f`."""
        like = accurate(f.detach())
        axis, ε = _class_axis(f), self.label_smoothing
        if y.is_floating_point():
            valid, q = None, y.to(like)
        else:
            valid = (y != self.ignore_index).unsqueeze(axis)
            q = _one_hot(like, y.clamp(min=0, max=f.shape[axis] - 1))
        if ε:
            q = (1 - ε) * q + ε / f.shape[axis]
        if valid is not None:
            q = q * valid
        if self.weight is None:
            return q
        return q * self.weight.to(like).reshape(-1, *[1] * (f.ndim - axis - 1))

    def _site_weight(self, f: Tensor, y: Tensor) -> Tensor:
        """w = Σ_k w_k q_k: the Hessian's weight at every position; the class axis has size one."""
        axis, weight = _class_axis(f), self.weight
        if y.is_floating_point() or (self.label_smoothing and weight is not None):
            return self._weighted_target(f, y).sum(axis, keepdim=True)
        valid = (y != self.ignore_index).unsqueeze(axis)  # Σ_k q_k = 1
        dtype = accurate_dtype(f)
        if weight is None:
            return valid.to(dtype)
        return valid * weight.to(f.device, dtype)[y.clamp(0, f.shape[axis] - 1)].unsqueeze(axis)


def _class_axis(f: Tensor) -> int:
    return 1 if f.ndim > 1 else 0


def _probabilities(f: Tensor) -> Tensor:
    """σ, laid out as f is where its classes lie side by side, as a transposed linear's do."""
    f, axis = accurate(f), _class_axis(f)
    if axis < f.ndim - 1 and _side_by_side(f):
        return f.movedim(axis, -1).softmax(-1).movedim(-1, axis)
    return f.softmax(axis)


def _classes_last(t: Tensor) -> Tensor:
    axis = _class_axis(t)
    return t.movedim(axis, -1) if axis < t.ndim - 1 else t


def _side_by_side(f: Tensor) -> bool:
    """Whether classes are in memory; a tensor that is recorded may come to lie otherwise."""
    return type(f) is Tensor and f.stride(_class_axis(f)) == 1


def _rows(t: Tensor) -> Tensor:
    return t.movedim(1, -1).flatten(0, -2)


def _drawn(p: Tensor, noise: Tensor) -> Tensor:
    """The first place along the last axis up to which p adds up to more than noise · its sum.

    Of many classes a block is drawn first, and a class in it by what the noise leaves: running sums
    of all of them take several times as long.
    """
    classes = p.shape[-1]
    if classes <= MANY_CLASSES:
        return _first_above(noise, p.contiguous().cumsum(-1))
    size = math.isqrt(classes)
    within = classes - classes % size
    parts = [p[..., :within].unflatten(-1, (-1, size)).sum(-1)]
    if within < classes:
        parts.append(p[..., within:].sum(-1, keepdim=True))
    sums = torch.cat(parts, -1).cumsum(-1)
    block = _first_above(noise, sums)
    below, above = (F.pad(sums, (1, 0)).gather(-1, block + k) for k in (0, 1))
    rest = (noise * sums[..., -1:] - below) / (above - below)
    places = block * size + torch.arange(size, device=p.device)
    chosen = p.gather(-1, places.clamp_max(classes - 1)) * (places < classes)
    largest = 1 - torch.finfo(p.dtype).eps / 2
    return block * size + _first_above(rest.clamp(0, largest), chosen.cumsum(-1))


def _first_above(noise: Tensor, sums: Tensor) -> Tensor:
    """Where running sums first exceed noise · the last one, which they do, as noise is below 1."""
    return torch.searchsorted(sums, noise * sums[..., -1:], right=True)


def _residual(σ: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """w (σ - onehot(y)), in two passes over the classes, and in the memory of σ."""
    axis = _class_axis(σ)
    return σ.mul_(w).scatter_add_(axis, y.unsqueeze(axis), -w)


def _one_hot(like: Tensor, y: Tensor) -> Tensor:
    axis = _class_axis(like)
    return torch.zeros_like(like).scatter_(axis, y.unsqueeze(axis), 1.0)
