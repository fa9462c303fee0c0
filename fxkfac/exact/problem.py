"""Model, loss and data as one differentiable problem: what matrices and products share.

Every curvature here but the Hessian is C = Jᵀ [•] J: J is the Jacobian of *all* predictions, and
[•] a linear map on tensors of the prediction's shape that acts on each datum alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxkfac.errors import DataError, NonFiniteError, OptionError, ParameterError
from fxkfac.exact.data import Data, merge, size_of
from fxkfac.exact.functions import jvp, vjp
from fxkfac.functional import FunctionalModel, Inputs, Params, bind, prediction_of
from fxkfac.isolation import held_by, own_randomness
from fxkfac.likelihoods.backpropagation import backpropagated_vectors
from fxkfac.likelihoods.base import Likelihood, count_of
from fxkfac.likelihoods.losses import Gaussian, likelihood_of
from fxkfac.likelihoods.targets import require_prediction
from fxkfac.ranges import require_generator

Model = nn.Module | Callable[..., Any]
Loss = nn.Module | Likelihood
Middle = Callable[[Tensor], Tensor]
"""U -> [•] U for several tensors at once, each datum flat: [k, N, dim F] -> [k, N, dim F]."""


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
    """A prediction for all data together with its loss.

    Attributes:
        prediction: f, for all data.
        target: y, for all data.
        size: N. Datum n owns the n-th of N equal parts of the prediction along axis 0.
        loss: (f, y) -> the loss itself, a scalar, with its R.
        likelihood: What the loss is the negative logarithm of.
        factor: R.
    """

    prediction: Prediction
    target: Any
    size: int
    loss: Callable[[Tensor, Any], Tensor]
    likelihood: Likelihood
    factor: float

    def value(self) -> Tensor:
        """The loss, attached to the graph."""
        return self.loss(self.prediction.f, self.target)

    def loss_hessian(self) -> Middle:
        """U -> (H_f L) U: the loss itself differentiated twice, R included. Section 2.5.2."""
        with torch.enable_grad():
            f = self.prediction.f.detach().requires_grad_()
            L = self.loss(f, self.target)
            (slope,) = vjp(L, [f], torch.ones_like(L), create_graph=True)
        return lambda U: torch.stack([vjp(slope, [f], u.reshape(f.shape))[0] for u in U]).view_as(U)

    def fisher(self, fisher: str, mc_samples: int, generator: torch.Generator | None) -> Middle:
        """U -> R Σ_c ▲_c (▲_cᵀ U), datum by datum. Equation 2, Definitions 20 and 21."""
        if fisher == "forward-only":
            raise OptionError(
                "fisher='forward-only' sends nothing back, so it has no matrix in the parameters; "
                "choose 'type-1', 'mc', 'empirical', 'type-2' or 'curvature-propagation'."
            )
        if fisher == "type-1" and isinstance(self.likelihood, Gaussian):
            return lambda U: self.factor * U  # E[(f - ỹ)(f - ỹ)ᵀ] = I for ỹ ~ N(f, I)
        source = torch.Generator() if generator is None else generator
        require_generator(source)
        vectors = self._vectors(fisher, mc_samples, source)

        def outer(U: Tensor) -> Tensor:
            total = torch.zeros_like(U)
            for v in vectors:  # one pass: the labels of a Monte-Carlo flavour are drawn once
                V = self.per_datum(v)
                total += V * (V * U).sum(-1, keepdim=True)
            return self.factor * total

        return outer

    def per_datum(self, t: Tensor) -> Tensor:
        """Shape of the prediction -> [N, dim F]."""
        return t.reshape(self.size, -1)

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


def copied(data: Any) -> Any:
    """The same inputs or targets, which a model may write into, and autograd may keep."""
    return pytree.tree_map_only(Tensor, Tensor.clone, data)


def predict(bound: FunctionalModel, names: Iterable[str], inputs: Inputs) -> Prediction:
    """Run the model with the parameters of these (canonical) names as leaves of a graph."""
    values = bound.current()
    leaves = {name: values[name].requires_grad_() for name in names}
    for value in values.values():
        # What a checkpoint saves must not depend on which parameters are asked for.
        if value.is_floating_point():
            value.requires_grad_()
    # Fused attention kernels have no second derivative; dropout draws from the caller's RNG.
    with (
        torch.enable_grad(),
        own_randomness(),
        held_by(bound.modules()),
        sdpa_kernel(SDPBackend.MATH),
    ):
        f = prediction_of(bound({**values, **leaves}, copied(inputs)))
    require_prediction(f)
    if not f.isfinite().all():
        raise NonFiniteError(
            "the prediction holds NaN or Inf, so that every curvature would. Check the parameters "
            "and the inputs."
        )
    return Prediction(f, leaves)


def pose(bound: FunctionalModel, names: Iterable[str], loss: Loss, data: Data) -> Problem:
    """Put model, loss and data together; several batches count as one data set.

    Raises:
        DataError: Targets that do not fit, or a prediction that is not N equal parts.
        LossError: A loss without a likelihood.
    """
    likelihood = likelihood_of(loss)
    inputs, target = merge(data)
    target = copied(target)
    size = size_of(inputs)
    prediction = predict(bound, names, inputs)
    f = prediction.f.detach()
    likelihood.validate(f, target)
    R = likelihood.reduction_factor(count_of(likelihood, f, target))
    return Problem(
        prediction=prediction,
        target=target,
        size=1 if 0 in likelihood.event_axes(f) else _parts(f, size),  # [C]: one datum alone
        loss=_value(loss, R),
        likelihood=likelihood,
        factor=R,
    )


def _value(loss: Loss, R: float) -> Callable[[Tensor, Any], Tensor]:
    if isinstance(loss, Likelihood):
        return lambda f, y: R * loss.criterion(f, y)
    return loss  # torch's own, so that no formula of ours is trusted


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
