"""A whole batch as one compiled graph: prediction, labels, the way back, loss, gradients and sums.

    noise, targets, parameters, data -> prediction, criterion, gradients, Σ x̃ x̃ᵀ, Σ g gᵀ

For flavours that send back one vector, where compiled code has the sums inside (see `inside`), and
for a likelihood that is a function of prediction, target and noise. Noise is drawn before the code
runs, so that labels are those of any other backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fxkfac.curvature.collect import Collector
from fxkfac.curvature.factors import scale_of
from fxkfac.curvature.inductor.code import Code, Values, code_of, names_of, read
from fxkfac.curvature.inductor.inside import GradientPieces, InputPieces, recording
from fxkfac.curvature.inductor.traced import Kind, prediction_kind, traceable, traced
from fxkfac.curvature.settings import Settings
from fxkfac.curvature.slope import batch_scale, may_scale, slope_of
from fxkfac.curvature.together import gradients_of
from fxkfac.graph.tapped import Tapped
from fxkfac.likelihoods.backpropagation import backpropagated_vectors, has_several
from fxkfac.likelihoods.base import count_of
from fxkfac.likelihoods.closed_form import ClosedForm
from fxkfac.likelihoods.losses import loss_text

FLAVOURS = frozenset({"mc", "empirical"})


class Objective(NamedTuple):
    """What is sent back: by which likelihood, for which targets, with labels drawn from where."""

    likelihood: ClosedForm
    targets: Tensor
    generator: Generator


def is_whole(settings: Settings) -> bool:
    """Whether a flavour sends one vector back."""
    fisher, samples = settings.fisher, settings.mc_samples
    return fisher in FLAVOURS and not has_several(fisher, samples)


@dataclass(frozen=True)
class Outcome:
    """What the code gives for a batch.

    Attributes:
        prediction: The prediction.
        criterion: Σ_n c(f_n, y_n).
        wanted: Its gradients in parameters; `None` where it does not depend on one.
        scale: What these are multiplied by.
        values: These and what sums are made of, by name.
    """

    prediction: Tensor
    criterion: Tensor
    wanted: tuple[Tensor | None, ...]
    scale: float
    values: Values


@dataclass(frozen=True)
class Whole:
    """The code for one shape of batch.

    Attributes:
        draws: Whether it is given noise.
        scales: Whether it is given what the loss's gradients are multiplied by.
        prediction: Of what kind the prediction is.
        code: All of it.
        arguments: Names of what it is given: noise, scale, targets, parameters, buffers and data.
        inputs: What A is made of.
        gradients: What B is made of, and exact blocks.
        results: The rest of an `Outcome`, with names in the place of tensors.
    """

    draws: bool
    scales: bool
    prediction: Kind
    code: Code
    arguments: tuple[str, ...]
    inputs: InputPieces
    gradients: GradientPieces
    results: Mapping[str, Any]

    def run(self, objective: Objective, tensors: list[Tensor]) -> Outcome:
        """Run it. Raises `DataError` if targets do not fit."""
        likelihood, targets, generator = objective
        f = self.prediction.shape_only()
        likelihood.validate(f, targets)
        given = [likelihood.noise(f, generator)] if self.draws else []
        scale = batch_scale(likelihood, f, targets, underflows=False) if self.scales else 1.0
        if self.scales:
            given.append(torch.full((), scale, dtype=f.dtype, device=self.prediction.device))
        given += [targets, *tensors]
        values = self.code(dict(zip(self.arguments, given, strict=True)))
        return Outcome(**read(self.results, values), scale=scale, values=values)


def whole(
    tapped: Tapped,
    kinds: tuple[Kind, ...],
    wanted: tuple[int, ...],
    sink: Collector,
    objective: Objective,
) -> Whole:
    """The code for parameters, buffers and data of these kinds; once for each shape and loss.

    Args:
        tapped: The graph.
        kinds: Shapes, layouts and dtypes of its arguments.
        wanted: Which of these ask for gradients, by position.
        sink: Whose sums are inside.
        objective: What is sent back.

    Raises:
        OptionError: The graph cannot be traced.
    """
    likelihood, y = objective.likelihood, Kind.of(objective.targets)
    settings = sink.settings.fisher, sink.settings.sharing
    loss = type(likelihood), loss_text(likelihood)
    key = ("whole", kinds, wanted, sink.schedule, settings, loss, y)
    return tapped.once(key, lambda: _whole(tapped, kinds, wanted, sink, objective))


def _likely_scale(likelihood: ClosedForm, f: Tensor) -> float:
    """R of data of this shape if all targets have weight one, as probabilities have.

    What the code is made for must not depend on whose targets it has seen first.
    """
    try:
        return scale_of(likelihood, count_of(likelihood, f, f))
    except Exception:  # a likelihood of one's own, of whatever kind, takes no such targets
        return 1.0


@traceable()
def _whole(
    tapped: Tapped,
    kinds: tuple[Kind, ...],
    wanted: tuple[int, ...],
    sink: Collector,
    objective: Objective,
) -> Whole:
    targets, generator = objective.targets, objective.generator
    likelihood = objective.likelihood.copied()  # the code keeps its weights
    draws = sink.settings.fisher == "mc"
    prediction = prediction_kind(tapped, kinds)
    underflows = tapped.captured.underflows
    scales = bool(wanted) and may_scale(prediction.dtype, underflows)
    like = prediction.shape_only()
    likelihood.validate(like, targets)  # before there is code for such targets
    R = _likely_scale(likelihood, like)

    def batch(*given: Tensor) -> dict[str, Any]:
        own = likelihood.given(given[0]) if draws else likelihood
        y, *arguments = given[draws + scales :]
        asked = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(arguments)]
        collector = recording(sink, prediction.device, R)
        f = tapped.module(collector, *asked)
        seen = f.detach()
        collector.send_back(
            f, backpropagated_vectors(sink.settings.fisher, own, seen, y, None, 1, generator)
        )
        slopes = partial(gradients_of, f, [asked[k] for k in wanted], retain_graph=True)
        factor = given[draws] if scales else 1.0
        criterion, slope = slope_of(likelihood, f, y, slopes, underflows, factor)
        with torch.no_grad():
            pieces = {
                "inputs": InputPieces.of(collector),
                "gradients": GradientPieces.of(collector),
            }
        return {"prediction": seen, "criterion": criterion, "wanted": slope, **pieces}

    noise = [Kind.of(likelihood.room(like))] if draws else []
    scale = [Kind(torch.Size(), (), prediction.dtype, prediction.device)] if scales else []
    graph, results = traced(batch, [*noise, *scale, Kind.of(targets), *kinds])
    placeholders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    on_gpu = prediction.device.type == "cuda"
    code = code_of(graph, results, set(graph.graph.nodes), replays=on_gpu)
    names = names_of(results)
    inputs, gradients = names.pop("inputs"), names.pop("gradients")
    return Whole(draws, scales, prediction, code, tuple(placeholders), inputs, gradients, names)
