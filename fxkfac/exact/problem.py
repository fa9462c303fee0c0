"""Model, loss and data as differentiable problems: what matrices and products share.

Every curvature here but the Hessian is C = Σ Jᵀ [•] J over the batches: J is the Jacobian of *all*
predictions of one, and [•] a linear map on tensors of the prediction's shape that acts on each
datum alone. Batches run one after the other: they may differ in lengths, or share an input, and
each has statistics of its own, as anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxkfac.errors import DataError, NonFiniteError, OptionError, ParameterError
from fxkfac.exact.data import Data, batches, size_of
from fxkfac.exact.functions import jvp, vjp
from fxkfac.functional import FunctionalModel, Inputs, Params, bind, copied, prediction_of
from fxkfac.isolation import own_randomness
from fxkfac.likelihoods.backpropagation import backpropagated_vectors
from fxkfac.likelihoods.base import Likelihood, count_of
from fxkfac.likelihoods.losses import Gaussian, likelihood_of
from fxkfac.likelihoods.targets import require_prediction
from fxkfac.ranges import require_generator
from fxkfac.reached import held

Model = nn.Module | Callable[..., Any]
Loss = nn.Module | Likelihood
Middle = Callable[[Tensor], Tensor]
"""U -> [•] U for k tensors at once, each of as many numbers as f: [k, ..] -> [k, ..]."""


@dataclass(frozen=True)
class Prediction:
    """The model's prediction f, attached to the graph, and the parameters it is a function of."""

    f: Tensor
    leaves: dict[str, Tensor]

    def jvp(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """J v, in the prediction's shape."""
        return jvp(self.f, self.of(tangents), list(tangents.values())).detach()

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Jᵀ u, in the shapes of all leaves."""
        pulled = vjp(self.f, list(self.leaves.values()), cotangent)
        return {name: t.detach() for name, t in zip(self.leaves, pulled, strict=True)}

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """The leaves of these names."""
        return [self.leaves[name] for name in names]


@dataclass(frozen=True)
class Problem:
    """A prediction for one batch together with its part of the loss.

    Attributes:
        prediction: f, for all data of the batch.
        target: y, for all of them.
        rows: How many data the inputs hold.
        loss: (f, y) -> its part of the loss of all batches, a scalar, with R.
        likelihood: What the loss is the negative logarithm of.
        factor: R, of all batches.
    """

    prediction: Prediction
    target: Any
    rows: int
    loss: Callable[[Tensor, Any], Tensor]
    likelihood: Likelihood
    factor: float

    @cached_property
    def size(self) -> int:
        """N. Datum n owns the n-th of N equal parts of the prediction along axis 0.

        Raises:
            DataError: The prediction is not N equal parts.
        """
        f = self.prediction.f
        if 0 in self.likelihood.event_axes(f.detach()):  # [C]: one datum alone
            return 1
        return _parts(f, self.rows)

    def loss_hessian(self) -> Middle:
        """U -> (H_f L) U: the loss itself differentiated twice, R included. Section 2.5.2."""
        with torch.enable_grad():
            f = self.prediction.f.detach().requires_grad_()
            L = self.loss(f, self.target)
            (slope,) = vjp(L, [f], torch.ones_like(L), create_graph=True)
        return lambda U: torch.stack([vjp(slope, [f], u.reshape(f.shape))[0] for u in U]).view_as(U)

    def fisher(self, fisher: str, mc_samples: int, generator: torch.Generator) -> Middle:
        """U -> R Σ_c ▲_c (▲_cᵀ U), datum by datum. Equation 2, Definitions 20 and 21."""
        if fisher == "type-1" and isinstance(self.likelihood, Gaussian):
            return lambda U: self.factor * U  # E[(f - ỹ)(f - ỹ)ᵀ] = I for ỹ ~ N(f, I)
        vectors = self._vectors(fisher, mc_samples, generator)

        def outer(U: Tensor) -> Tensor:
            data = U.reshape(len(U), self.size, -1)
            total = torch.zeros_like(data)
            for v in vectors:  # one pass: the labels of a Monte-Carlo flavour are drawn once
                V = v.reshape(self.size, -1)
                total += V * (V * data).sum(-1, keepdim=True)
            return (self.factor * total).view_as(U)

        return outer

    def _vectors(
        self, fisher: str, mc_samples: int, generator: torch.Generator
    ) -> Iterable[Tensor]:
        f = self.prediction.f.detach()
        if fisher == "empirical":  # the criterion's own gradient, not the likelihood's formula
            with torch.enable_grad():
                at = f.requires_grad_()
                c = self.likelihood.criterion(at, self.target)
                return vjp(c, [at], torch.ones_like(c))
        positions = torch.arange(f.numel() // self.size, device=f.device)
        datum = positions.expand(self.size, -1).reshape(f.shape)
        return backpropagated_vectors(
            fisher, self.likelihood, f, self.target, datum, mc_samples, generator
        )


def loss_of(problems: Sequence[Problem]) -> Tensor:
    """The loss of all batches, attached to the graph."""
    return torch.stack([p.loss(p.prediction.f, p.target) for p in problems]).sum()


def middle_of_fisher(
    fisher: str, mc_samples: int, generator: torch.Generator | None
) -> Callable[[Problem], Middle]:
    """The Fisher's [•] of every batch, whose labels are drawn one after the other.

    Raises:
        OptionError: The flavour has no matrix, or the generator is none.
    """
    if fisher == "forward-only":
        raise OptionError(
            "fisher='forward-only' sends nothing back, so it has no matrix in the parameters; "
            "choose 'type-1', 'mc', 'empirical', 'type-2' or 'curvature-propagation'."
        )
    source = torch.Generator() if generator is None else generator
    require_generator(source)
    return lambda problem: problem.fisher(fisher, mc_samples, source)


def predict(
    bound: FunctionalModel, names: Iterable[str], batches: Sequence[Inputs]
) -> list[Prediction]:
    """Run the model on each batch, with the parameters of these (canonical) names as leaves."""
    values = bound.current()
    leaves = {name: values[name].requires_grad_() for name in names}
    for value in values.values():
        # What a checkpoint saves must not depend on which parameters are asked for.
        if value.is_floating_point():
            value.requires_grad_()
    with own_randomness():  # dropout draws from the caller's RNG
        return [Prediction(_run(bound, {**values, **leaves}, inputs), leaves) for inputs in batches]


def _run(bound: FunctionalModel, values: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), held(bound.model), sdpa_kernel(SDPBackend.MATH):
        f = prediction_of(bound(values, copied(inputs)))
    require_prediction(f)
    if not f.isfinite().all():
        raise NonFiniteError(
            "the prediction holds NaN or Inf, so that every curvature would. Check the parameters "
            "and the inputs."
        )
    return f


def pose(bound: FunctionalModel, names: Iterable[str], loss: Loss, data: Data) -> list[Problem]:
    """Put model, loss and data together: a problem for each batch of one data set.

    Raises:
        DataError: There are no data, or targets that do not fit.
        LossError: A loss without a likelihood.
    """
    likelihood = likelihood_of(loss)
    inputs, given = zip(*batches(data), strict=True)
    targets, sizes = [copied(y) for y in given], [size_of(x) for x in inputs]
    predictions = predict(bound, names, inputs)
    count = 0.0
    for prediction, target in zip(predictions, targets, strict=True):
        f = prediction.f.detach()
        likelihood.validate(f, target)
        count += count_of(likelihood, f, target)
    R = likelihood.reduction_factor(count)
    part = _part(loss, likelihood, R, alone=len(sizes) == 1)
    return [
        Problem(prediction, target, size, part, likelihood, R)
        for prediction, target, size in zip(predictions, targets, sizes, strict=True)
    ]


def _part(
    loss: Loss, likelihood: Likelihood, R: float, alone: bool
) -> Callable[[Tensor, Any], Tensor]:
    """(f, y) -> what a batch adds to the loss; by torch's own, so that no formula is trusted."""
    if isinstance(loss, Likelihood):
        return lambda f, y: R * loss.criterion(f, y)
    if alone:
        return loss
    summed: Any = copy(loss)
    summed.reduction = "sum"  # which, unlike means over batches, adds up
    return lambda f, y: R / likelihood.scale * summed(f, y)


def _parts(f: Tensor, size: int) -> int:
    if len(f) % size:
        raise DataError(
            f"the inputs hold {size} data, but the prediction has shape {tuple(f.shape)}; expected "
            "as many rows along axis 0, or a multiple. Move the batch axis of both to the front."
        )
    return size


def bind_for(model: Model, params: Params | None, names: Iterable[str] | None) -> FunctionalModel:
    """Bind the model; a module needs `names` only if none of its parameters is selected."""
    if params is None and names is not None and isinstance(model, nn.Module):
        return bind(model, list(names))
    return bind(model, params)


def canonical(bound: FunctionalModel, names: Iterable[str]) -> list[str]:
    """Resolve names. Raises `ParameterError` if two are one parameter, or one has no derivative."""
    resolved = [bound.resolve(name) for name in names]
    for i, name in enumerate(resolved):
        if name in resolved[:i]:
            raise ParameterError(f"the parameter {name!r} is named twice; name it once.")
        if not bound.tensors[name].is_floating_point():
            raise ParameterError(
                f"{name!r} has dtype {bound.tensors[name].dtype}; only floating parameters have "
                "curvature."
            )
    return resolved
