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

from fxkfac.errors import DataError
from fxkfac.graph.deviation import relative_error
from fxkfac.graph.digits import tolerance_of_parts
from fxkfac.graph.flat import FlatModel, State
from fxkfac.graph.front_ends.capture import Captured, Refusal
from fxkfac.graph.quiet import quietly
from fxkfac.graph.tap import Sink, Taps
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.derived import computation
from fxkfac.graph.uses.normal import Input, parameter_gradient

WRONG_GRADIENTS = "gradients put together"  # how the reason begins where only they are wrong


def run_graph(
    captured: Captured, module: Any, state: State, data: Sequence[Tensor], *sink: Sink
) -> Any:
    """Run what was made of a captured graph with the random numbers of `FlatModel.predict`."""
    torch.manual_seed(0)
    with torch.enable_grad():
        return module(*sink, *captured.arguments(state), *data)


def is_model(model: FlatModel, captured: Captured, state: State, data: Sequence[Tensor]) -> str:
    """Empty where the graph gives the model's prediction on these data, else what is wrong.

    Raises:
        DataError: The graph holds for other data than these.
    """
    expected = model.predict(state, data)
    try:
        found = run_graph(captured, captured.module, state, data)
    except DataError:
        raise
    except Exception as error:  # whatever a baked-in size makes an op say
        return f"its graph does not run: {str(error).splitlines()[0] if str(error) else error!r}"
    if not expected.is_floating_point():
        return f"the prediction has dtype {expected.dtype}; expected floating point numbers"
    if found.shape != expected.shape:
        return f"its graph predicts {tuple(found.shape)}, the model {tuple(expected.shape)}"
    off = relative_error(found, expected)
    if off <= tolerance_of_parts(expected, captured.lowest):
        return ""
    return f"its prediction is not the model's ({off:.1e})"


def lost_axis(tapped: Tapped, state: State, data: Sequence[Tensor]) -> str:
    """Empty where the outputs at the taps have the axes that they had, else what is wrong.

    A batch of one may have fewer of them, as behind `squeeze()`.
    """
    taps = Taps()
    run_graph(tapped.captured, tapped.module, state, data, taps)
    for use in tapped.uses:
        y = taps.outputs[use.tap]
        if y.ndim != len(use.y_shape):
            return (
                f"{', '.join(use.parameters)} enters {use.op}, whose output {tuple(y.shape)} has "
                f"not as many axes as for more data, {use.y_shape}"
            )
    return ""


def agrees(model: FlatModel, tapped: Tapped, tensors: list[Tensor], n: int) -> bool:
    """Compare graph and model at a batch size that is seen for the first time."""
    with quietly():
        wrong = is_model(model, tapped.captured, model.state(), tensors)
        if n == 1 and not wrong:
            wrong = lost_axis(tapped, model.state(), tensors)
    if not wrong:
        tapped.verified.add(n)
    return not wrong


def require_gradients(
    model: FlatModel,
    tapped: Tapped,
    state: State,
    data: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Raise `Refusal` where a gradient from the taps is not autograd's on the model itself."""
    taps = Taps()
    prediction = run_graph(tapped.captured, tapped.module, state, data, taps)
    cotangent = _cotangent(prediction)
    at_taps = taps.gradients(prediction, cotangent)
    found = tap_gradients(tapped, taps.inputs, at_taps, names, state, data)
    _require_equal(found, model, state, data, cotangent, tapped.captured.lowest, "from its taps")


def require_graph_gradients(
    model: FlatModel,
    captured: Captured,
    state: State,
    data: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """The same for parameters without normal form, whose gradients are the graph's by autograd."""
    if not names:
        return
    leaves = {name: state[name].detach().requires_grad_() for name in names}
    prediction = run_graph(captured, captured.module, {**state, **leaves}, data)
    cotangent = _cotangent(prediction)
    found = tuple(torch.zeros_like(t) for t in leaves.values())
    if prediction.requires_grad:
        wanted = list(leaves.values())
        found = torch.autograd.grad(
            prediction, wanted, cotangent, allow_unused=True, materialize_grads=True
        )
    gradients = dict(zip(names, found, strict=True))
    _require_equal(gradients, model, state, data, cotangent, captured.lowest, "by autograd")


def _cotangent(prediction: Tensor) -> Tensor:
    """Whole numbers over a power of two: what cancels does so exactly, and their sum does not.

    The sum alone is what the bias of a last layer with one output gets.
    """
    n = prediction.numel()
    numbers = torch.arange(n, device="cpu") - n // 3
    return (numbers / 2 ** n.bit_length()).to(prediction).view_as(prediction)


def _require_equal(
    found: Mapping[str, Tensor],
    model: FlatModel,
    state: State,
    data: Sequence[Tensor],
    cotangent: Tensor,
    lowest: torch.dtype,
    how: str,
) -> None:
    errors, wrong = model.gradient_errors(found, state, data, cotangent, lowest)
    if wrong:
        listed = ", ".join(f"{name} ({errors[name]:.1e})" for name in wrong[:4])
        raise Refusal(
            f"{WRONG_GRADIENTS} {how} are not the model's: relative errors {listed}. "
            "A custom autograd.Function or a detached part gets lost, or a rule of your own is "
            "wrong."
        )


def tap_gradients(
    tapped: Tapped,
    inputs: Mapping[int, Input],
    at_taps: Mapping[int, Tensor],
    names: Sequence[str],
    state: State,
    data: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Every named parameter's gradient, from the inputs of uses and the gradients at taps alone.

    That of a derived weight is pulled back to the parameters which it is computed from.
    """
    shapes = {name: shape for name, (_, shape) in tapped.derived.items()}
    shapes |= {name: tuple(state[name].shape) for name in names}
    like = state[names[0]] if names else next(iter(state.values()))
    of_weights = {name: like.new_zeros(shape) for name, shape in shapes.items()}
    for k, use in enumerate(tapped.uses):
        flat = parameter_gradient(use, inputs[k], at_taps[use.tap])
        parts = flat.split([torch.Size(s).numel() for s in use.view.shapes])
        for name, part in zip(use.parameters, parts, strict=True):
            if name in of_weights:
                of_weights[name] = of_weights[name] + part.view_as(of_weights[name])
    total = {name: of_weights[name] for name in names}
    if not tapped.derived:
        return total
    leaves = {name: state[name].detach().requires_grad_() for name in names}
    nodes = [node for node, _ in tapped.derived.values()]
    captured = tapped.captured
    computed = computation(captured.module, nodes)
    weights = run_graph(captured, computed, {**state, **leaves}, data)
    pulled = torch.autograd.grad(
        weights,
        list(leaves.values()),
        [of_weights[name].to(w.dtype) for name, w in zip(tapped.derived, weights, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    return {n: t + p for (n, t), p in zip(total.items(), pulled, strict=True)}
