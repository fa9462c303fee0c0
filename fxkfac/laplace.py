"""Factors -> a Gaussian posterior over parameters, what it predicts, and how likely the data are.

With the prior N(0, I/τ) and the curvature H = Σ_n J_nᵀ [∇²c_n] J_n of all data, C = R H, Laplace's
approximation at the trained parameters θ* (MacKay 1992; with Kronecker factors Ritter et al. 2018;
linearised predictions Immer et al. 2021) is

    p(θ | D) ≈ N(θ*, (H + τ I)⁻¹)
    log p(D | τ) ≈ −Σ_n c_n − ½ τ‖θ*‖² + ½ P log τ − ½ log det(H + τ I)

Whatever the reduction of the loss, H and Σ_n c_n are those of its sum: R is taken out. Both are
exact where predictions are linear in the parameters, c is square, and C is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxkfac.curvature.corrections.corrected import Corrected, uncorrected
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.point import require_here
from fxkfac.errors import OptionError, ParameterError, UnknownParameter
from fxkfac.exact.functions import jvp
from fxkfac.functional import FunctionalModel, Inputs, Params, copied, prediction_of
from fxkfac.isolation import full_precision, no_draws
from fxkfac.linalg import operators
from fxkfac.linalg.operators import Damping, Named
from fxkfac.ranges import number_in, require_number, require_positive

Draws = Mapping[str, Tensor]  # of the parameters, (number, *shape)
Run = Callable[[dict[str, Tensor]], Tensor]  # one draw -> a prediction

HALVINGS = 60  # of an interval of log τ: to the last digit


@final
@dataclass(frozen=True)
class Posterior:
    """N(θ*, (H + τ I)⁻¹) over some parameters; the others are what they are.

    Attributes:
        curvature: H, with its eigenvalues at hand.
        prior_precision: τ.
        reduction: R, by which a loss is Σ_n c_n.
        parameters: θ*, all of the model's parameters by name.
        model: The model as a function of them.
    """

    curvature: Named
    prior_precision: float
    reduction: float
    parameters: Mapping[str, Tensor] = field(repr=False)
    model: FunctionalModel = field(repr=False)

    def __post_init__(self) -> None:
        require_positive("prior_precision", number_in(self.prior_precision))

    def __repr__(self) -> str:
        names = list(self.curvature.shapes)
        of = ", ".join(names[:4]) + ", .." * (len(names) > 4)
        return f"Posterior(over {of}; prior_precision={self.prior_precision:g})"

    @property
    def mean(self) -> dict[str, Tensor]:
        """θ* of the parameters that the posterior is over."""
        return {name: self.parameters[name] for name in self.curvature.shapes}

    @property
    def precision(self) -> Named:
        """H + τ I, an operator over tensors by name: see `fxkfac.operators`."""
        found = operators.damped(self.curvature, Damping(self.prior_precision))
        assert isinstance(found, Named)
        return found


@full_precision()
def posterior(
    factors: Factors | Corrected,
    prior_precision: float = 1.0,
    names: str | Iterable[str] = (),
    params: Params | None = None,
) -> Posterior:
    """The posterior at the parameters that factors were computed at, in the dtype of the factors.

    Args:
        factors: Of all training data, by `fisher="type-2"` or one that approximates it: what
            `fxkfac.kfac` returned, or with corrections, of the same data, `fxkfac.ekfac` or
            `fxkfac.kfoc`.
        prior_precision: τ; of a loss with `reduction="mean"` and a weight decay, this is the decay
            over R (for `nn.CrossEntropyLoss`, times the number of data).
        names: The parameters that it is over, such as a last layer's, in whole blocks; without
            names, all that have a block.
        params: What `fxkfac.kfac` had in the place of the model's own parameters.

    Raises:
        OptionError: The prior precision is not positive; `factors` are none, such as a running
            average, or were corrected with other data; or what `operators.diagonalised` raises.
        UnknownParameter: A name is unknown, or another parameter of its block is missing.
        MergeError: The parameters have other values than when the factors were computed; of sums
            over several points, of averages, and of loaded factors this is not known.
        ParameterError: A weight is not a parameter of the model, but computed from some.
    """
    base = uncorrected(factors)
    _require_same_data(factors, base)
    listed = (names,) if isinstance(names, str) else names
    curvature = operators.scaled(factors.operator(*listed), 1 / base.reduction)
    curvature = operators.diagonalised(curvature)
    assert isinstance(curvature, Named)
    held = {name: t.clone() for name, t in base.model.override(params).items()}
    require_here(base.point, held)
    if computed := [name for name in curvature.shapes if name not in held]:
        raise ParameterError(
            f"{computed} are computed from parameters; expected parameters, which have values of "
            "their own. Name those that the posterior should be over by `names`."
        )
    return Posterior(curvature, prior_precision, base.reduction, held, base.model)


def _require_same_data(factors: Factors | Corrected, base: Factors) -> None:
    """Raise `OptionError` unless all blocks are sums over as many data, with one R."""
    if isinstance(factors, Corrected) and not math.isclose(factors.count, base.count, rel_tol=1e-5):
        raise OptionError(
            f"the factors are of {base.n} data, which count as {base.count:g}, and their "
            f"corrections of {factors.n}, which count as {factors.count:g}; expected the same "
            "training data for both. Correct the factors with all of them."
        )


def sample(posterior: Posterior, number: int, generator: Generator) -> dict[str, Tensor]:
    """Draws of the parameters, by name, of shape (number, *shape).

    The same state of the generator gives the same draws, stretched, for every prior precision.

    Args:
        posterior: What they are drawn from.
        number: How many.
        generator: On the device of the factors.

    Returns:
        Tensors in the parameters' own dtypes.

    Raises:
        OptionError: `number` is none, or as `fxkfac.operators.power` does.
    """
    shifts = operators.sample(posterior.precision, number, generator)
    assert isinstance(shifts, dict)
    return {name: mean + shifts[name].to(mean) for name, mean in posterior.mean.items()}


@sdpa_kernel(SDPBackend.MATH)  # the fused attention has no rule for slopes
def linearised(posterior: Posterior, draws: Draws, inputs: Inputs) -> Tensor:
    """f(θ*) + J (θ − θ*) for every draw of the parameters, of shape (number, *prediction).

    It is the model that a GGN is the curvature of, so that this is what such a posterior is about.
    All draws run together; pass some at a time where memory is short. Where an op of the model
    knows no draws beside each other, they run one after the other.

    Args:
        posterior: The posterior that the draws are from.
        draws: What `fxkfac.laplace.sample` returned, or tensors of such shapes, of any dtype.
        inputs: One batch.

    Raises:
        UnknownParameter, ParameterError: The draws are not of the posterior's parameters, or have
            other shapes.
        OptionError: The model draws random numbers itself, as dropout does in training.
    """
    mean = posterior.mean

    def linear(draw: dict[str, Tensor]) -> Tensor:
        shift = {name: draw[name] - mean[name] for name in mean}
        found = torch.func.jvp(lambda p: _prediction(posterior, p, inputs), (mean,), (shift,))
        return found[0] + found[1]  # f(θ*) and J (θ − θ*)

    def alone(draw: dict[str, Tensor]) -> Tensor:
        at = {name: t.detach().requires_grad_() for name, t in mean.items()}
        with torch.enable_grad():
            f = _prediction(posterior, at, inputs)
            return f + jvp(f, list(at.values()), [draw[name] - mean[name] for name in mean])

    return _of_each(posterior, draws, linear, alone)


def predictions(posterior: Posterior, draws: Draws, inputs: Inputs) -> Tensor:
    """f(θ) for every draw of the parameters, of shape (number, *prediction).

    Args:
        posterior, draws, inputs: As of `fxkfac.laplace.linearised`.

    Raises:
        UnknownParameter, ParameterError, OptionError: As `fxkfac.laplace.linearised` does.
    """
    predicted = partial(_prediction, posterior, inputs=inputs)
    return _of_each(posterior, draws, predicted, predicted)


def _of_each(posterior: Posterior, draws: Draws, together: Run, alone: Run) -> Tensor:
    """Of all draws together, or of one after the other, by what does the same."""
    held = _require_draws(posterior, draws)
    with no_draws("one prediction for each draw of the parameters"):
        try:
            found = torch.func.vmap(together)(held)
        except RuntimeError:  # what torch says of an op that has no rule for it
            each = zip(*(t.unbind() for t in held.values()), strict=True)
            found = torch.stack([alone(dict(zip(held, draw, strict=True))) for draw in each])
    return found.detach()


def _require_draws(posterior: Posterior, draws: Draws) -> dict[str, Tensor]:
    """The draws in the posterior's order and dtype. Raises `ParameterError` unless they fit."""
    names = list(posterior.mean)
    if not isinstance(draws, Mapping) or not all(isinstance(d, Tensor) for d in draws.values()):
        raise ParameterError(
            f"draws are of type {type(draws).__name__}, and not tensors by name; expected such, "
            "as fxkfac.laplace.sample returns them."
        )
    if set(draws) != set(names):
        raise UnknownParameter(f"draws of {list(draws)}; expected one of each of {names}.")
    held = {name: draws[name].to(t.dtype) for name, t in posterior.mean.items()}
    shapes = {tuple(t.shape[:1]) for t in held.values()}
    if len(shapes) > 1 or any(t.shape[1:] != posterior.mean[n].shape for n, t in held.items()):
        raise ParameterError(
            f"draws of shapes {[tuple(t.shape) for t in held.values()]}; expected as many of each, "
            f"of (number, *shape) with shapes {[tuple(t.shape) for t in posterior.mean.values()]}. "
            "A draw by itself is one of number 1."
        )
    return held


def _prediction(posterior: Posterior, chosen: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    return prediction_of(posterior.model({**posterior.parameters, **chosen}, copied(inputs)))


def log_evidence(posterior: Posterior, loss: Tensor | float) -> Tensor:
    """log p(D | τ), the marginal likelihood of the training data, a tensor of no axes.

    Args:
        posterior: At trained parameters.
        loss: The loss there over all data that the factors are of, with its reduction. Where it
            is −log p only up to a constant, as `nn.MSELoss` is, so is the result.

    Raises:
        OptionError: The loss is no finite number.
    """
    require_number("loss", number_in(loss.detach() if isinstance(loss, Tensor) else loss))
    τ, P = posterior.prior_precision, posterior.curvature.numel
    nll = loss / posterior.reduction
    fit = -nll - τ / 2 * _square(posterior)
    return fit + P / 2 * math.log(τ) - operators.logdet(posterior.precision) / 2


def most_likely(posterior: Posterior) -> Posterior:
    """The same with the τ of the largest evidence, parameters and curvature left as they are.

    Twice the evidence's slope in log τ is γ − τ‖θ*‖², with γ = Σ λ/(λ + τ) over the eigenvalues of
    H: the number of parameters that the data determine (MacKay 1992). It falls with τ, and is zero
    once.

    Args:
        posterior: With any prior precision.

    Raises:
        OptionError: There is no such τ, since all parameters or all eigenvalues are zero.
    """
    λ, square = operators.eigenvalues(posterior.curvature), _square(posterior).item()
    largest = λ.max().item()
    if not (largest > 0 and square > 0):
        raise OptionError(
            f"the largest eigenvalue is {largest:g} and the squared norm of the parameters "
            f"{square:g}; expected positive ones: without, no prior precision is the best."
        )
    # There γ ≥ 1/2 ≥ τ‖θ*‖² at the lower end, and γ ≤ P = τ‖θ*‖² at the upper.
    low, high = math.log(min(largest, 0.5 / square)), math.log(len(λ) / square)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        τ = math.exp(middle)
        if (λ / (λ + τ)).sum().item() > τ * square:
            low = middle
        else:
            high = middle
    return replace(posterior, prior_precision=math.exp(low))


def _square(posterior: Posterior) -> Tensor:
    """‖θ*‖²."""
    like = posterior.curvature.like
    return torch.stack([t.to(like).square().sum() for t in posterior.mean.values()]).sum()
