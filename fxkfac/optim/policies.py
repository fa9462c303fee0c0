"""How long a step may be, and how much damping the next one gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxkfac.exact import ggn_vector_product
from fxkfac.functional import FunctionalModel
from fxkfac.parameters import nest_names
from fxkfac.precision import accurate, accurate_dtype, widest

GOOD, BAD = 0.75, 0.25  # reduction ratios (Martens & Grosse 2015, Section 6.5)
CHANGE = 19 / 20  # of the damping in one step


def clipped(gradients: Mapping[str, Tensor], max_norm: float | None) -> dict[str, Tensor]:
    """Gradients whose norm together is at most `max_norm`, as by `clip_grad_norm_`."""
    if max_norm is None:
        return dict(gradients)
    norm = torch.nn.utils.get_total_norm(gradients.values())
    factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    return {name: factor * g for name, g in gradients.items()}


def kl_factor(
    steps: Sequence[tuple[float, Tensor, Tensor]], kl_clip: float | None
) -> float | Tensor:
    """What to multiply natural gradients by, so that Σ lr² vᵀg is at most `kl_clip`.

    lr² vᵀg is lr² vᵀ(C + λ I)v, twice the KL divergence that a step of length lr along v makes of
    the model's distribution, to second order. The factor is min(1, √(κ / Σ lr² vᵀg)).

    Args:
        steps: For every parameter lr, v and g.
        kl_clip: κ.
    """
    if kl_clip is None or not steps:
        return 1.0
    # A parameter's own part may be negative, as a bias' that has joined a weight; the sum is not.
    parts = [lr**2 * (widest(v) * widest(g)).sum() for lr, v, g in steps]
    factor = (kl_clip / torch.stack(parts).sum().clamp_min(0.0)).sqrt().clamp_max(1.0)
    return factor.to(accurate_dtype(steps[0][1]))  # of zero it is one


def predicted_change(
    model: FunctionalModel,
    loss: Any,
    data: Any,
    before: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
) -> float:
    """gᵀδ + ½ δᵀGδ: what the loss's quadratic model, with the exact GGN, says of a step δ.

    Args:
        model, loss, data: Of the step.
        before: The parameters before it.
        gradients: g.
        step: δ, with the names of `gradients`.
    """
    params: Any = dict(before)
    if model.structure is not None:
        params = nest_names({**model.tensors, **before, **_tied(model, before)}, model.structure)
    curved = ggn_vector_product(model.model, loss, data, dict(step), params)
    slope = sum(_inner(gradients[n], δ) for n, δ in step.items())
    bend = sum(_inner(curved[n], δ) for n, δ in step.items())
    return float(slope + bend / 2)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ in float32 or better: float16 has no room for a product of small numbers."""
    return (accurate(a) * accurate(b)).sum()


def _tied(model: FunctionalModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {alias: values[name] for alias, name in model.aliases.items() if name in values}


def next_damping(damping: float, actual: float, predicted: float, interval: int) -> float:
    """Levenberg-Marquardt: less damping where the quadratic model is right, more where it is not.

    Args:
        damping: λ of the last steps.
        actual: By how much the loss has changed in one step.
        predicted: By how much the quadratic model has said it would.
        interval: The number of steps from one change to the next.
    """
    ratio = actual / predicted if predicted < 0 else -1.0  # a step that is to go up is a bad one
    if ratio > GOOD:
        return damping * CHANGE**interval
    return damping if ratio >= BAD else damping / CHANGE**interval
