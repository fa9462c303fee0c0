"""Is the captured graph the model? Values and gradients of both, compared on trial data.

A front end may lose a custom backward, or bake the batch size in, without a word. So no graph is
trusted before it gave the model's own prediction, at the example's batch size and at another one,
and before the gradients put together from its taps were autograd's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxkfac.functional import FunctionalModel
from fxkfac.graph.capture import Captured, Refusal, prediction_of
from fxkfac.graph.ir import Use
from fxkfac.graph.locate import Taps
from fxkfac.graph.normal import parameter_gradient
from fxkfac.graph.signature import Signature


def tolerance(t: Tensor) -> float:
    """Half of the digits: far above rounding, far below a lost or doubled term."""
    return torch.finfo(t.dtype).eps ** 0.5 if t.is_floating_point() else 0.0


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, or the absolute error where nothing is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (found - expected).norm().item() / (scale if scale > 0 else 1.0)


def model_prediction(
    bound: FunctionalModel,
    signature: Signature,
    state: Mapping[str, Tensor],
    data: Sequence[Tensor],
) -> Tensor:
    """The model itself, run without the graph."""
    torch.manual_seed(0)
    with torch.enable_grad():  # the model may take gradients inside
        return prediction_of(bound(state, signature.inputs(list(data))))


def graph_run(module: Any, state: Mapping[str, Tensor], data: Sequence[Tensor]) -> Any:
    """A captured or tapped graph, run with the same random numbers as the model."""
    torch.manual_seed(0)
    with torch.enable_grad():
        return module(*state.values(), *data)


def value_error(
    bound: FunctionalModel,
    signature: Signature,
    captured: Captured,
    state: Mapping[str, Tensor],
    data: Sequence[Tensor],
) -> float:
    """Relative error of the graph's prediction; infinite where the graph does not run."""
    expected = model_prediction(bound, signature, state, data)
    try:
        found = graph_run(captured.module, state, data)
    except Exception:  # whatever a baked-in size makes an op say
        return float("inf")
    if found.shape != expected.shape or not found.is_floating_point():
        return float("inf")
    error = relative_error(found, expected)
    return error if error == error else float("inf")


def require_gradients(
    bound: FunctionalModel,
    signature: Signature,
    uses: Sequence[Use],
    taps: Taps,
    state: Mapping[str, Tensor],
    data: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Raise `Refusal` where a gradient from the taps is not autograd's on the model itself."""
    prediction = taps[0]
    cotangent = torch.linspace(-1, 1, prediction.numel()).to(prediction).view_as(prediction)
    found = tap_gradients(uses, taps, cotangent, names, state)
    expected = model_gradients(bound, signature, state, data, cotangent, names)
    wrong = [
        f"{n} ({relative_error(found[n], expected[n]):.1e})"
        for n in names
        if relative_error(found[n], expected[n]) > tolerance(expected[n])
    ]
    if wrong:
        raise Refusal(
            "gradients put together from its taps are not the model's: relative errors "
            f"{', '.join(wrong[:4])}. A custom autograd.Function or a detached part gets lost."
        )


def tap_gradients(
    uses: Sequence[Use],
    taps: Taps,
    cotangent: Tensor,
    names: Sequence[str],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every parameter's gradient of ⟨cotangent, prediction⟩, from the taps alone."""
    prediction, inputs, outputs = taps
    total = {name: torch.zeros_like(state[name]) for name in names}
    if not outputs or not prediction.requires_grad:
        return total
    at_taps = torch.autograd.grad(
        prediction, outputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for use, x in zip(uses, inputs, strict=True):
        flat = parameter_gradient(use, x, at_taps[use.tap])
        parts = flat.split([torch.Size(s).numel() for s in use.view.shapes])
        for name, part in zip(use.parameters, parts, strict=True):
            if name in total:
                total[name] = total[name] + part.view_as(total[name])
    return total


def model_gradients(
    bound: FunctionalModel,
    signature: Signature,
    state: Mapping[str, Tensor],
    data: Sequence[Tensor],
    cotangent: Tensor,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Every parameter's gradient of ⟨cotangent, prediction⟩, by autograd on the model itself."""
    leaves = {n: state[n].detach().requires_grad_() for n in names}
    prediction = model_prediction(bound, signature, {**state, **leaves}, data)
    if not prediction.requires_grad or not leaves:
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    gradients = torch.autograd.grad(
        prediction, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))
