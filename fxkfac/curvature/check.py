"""Taps -> parameter gradients: the compiler's own proof that no use was missed.

The gradient Σ_rows x gᵀ of every use, mapped back through its view and summed over the uses, must
be autograd's gradient on the original model. This needs no special model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.data import batches
from fxkfac.curvature.options import require_program
from fxkfac.errors import TapMismatch
from fxkfac.functional import Params
from fxkfac.graph.experiments.verify import tap_gradients
from fxkfac.graph.flat import FlatModel
from fxkfac.graph.program import Program
from fxkfac.graph.tap import Taps
from fxkfac.isolation import full_precision, own_randomness, without_graph
from fxkfac.likelihoods.losses import likelihood_of, loss_value


@full_precision()
def check(
    program: Program, loss: Any, data: tuple[Any, Tensor], params: Params | None = None
) -> dict[str, float]:
    """Compare every parameter's gradient, put together from the taps, with autograd's.

    Args:
        program: What `fxkfac.trace` returned.
        loss: A torch loss or a `Likelihood`.
        data: One (inputs, targets) pair.
        params: Tensors in the place of the model's own parameters.

    Returns:
        The relative error of every covered parameter, ‖found − expected‖ / ‖expected‖.

    Raises:
        TapMismatch: A gradient differs by more than half of the digits of its dtype, or of
            float32 where the model computes in less than float64 inside; where it computes in
            half precision or in TensorFloat-32, by more than four roundings in that, and than four
            times what one of parameters and data does to the model's own gradients.
        OptionError, LossError, DataError: As `fxkfac.kfac`.
    """
    require_program(program)
    ((inputs, targets),) = batches([data])
    likelihood = likelihood_of(loss)
    names = program.parameters
    state, taps = program.state(params), Taps()
    model = FlatModel(program.model, program.signature.with_constants(inputs))
    with own_randomness(0):
        run = program.run(inputs, params, taps)
        likelihood.validate(run.prediction.detach(), targets)
        cotangent = _loss_gradient(loss, run.prediction.detach(), targets)
        tensors = [without_graph(t) for t in program.signature.tensors(inputs)]
        at_taps = taps.gradients(run.prediction, cotangent)
        found = tap_gradients(run.tapped, taps.inputs, at_taps, names, state, tensors)
        lowest = run.tapped.captured.lowest
        errors, wrong = model.gradient_errors(found, state, tensors, cotangent, lowest)
    if wrong:
        listed = ", ".join(f"{name} ({errors[name]:.1e})" for name in wrong)
        raise TapMismatch(
            f"the gradients put together from the taps differ from autograd's for {listed}; "
            "expected equality to half of the digits. Has the model changed since it was traced? "
            "Trace it anew; if that does not help, this is an error in fxkfac."
        )
    return errors


def _loss_gradient(loss: Any, prediction: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the loss, with its reduction, in the prediction."""
    leaf = prediction.requires_grad_()
    with torch.enable_grad():
        value = loss_value(loss, leaf, without_graph(targets))
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient
