"""A loss as a negative log-likelihood: (prediction f, target y) -> criterion, gradient, S, samples.

Paper, Equation 1 and Section 2.3: the empirical risk is R Σ_n c(f_n, y_n) with
c(f, y) = -log r(y | f). A `Likelihood` keeps the criterion c apart from the reduction factor R,
which belongs to the whole data set, and gives what the Fisher flavours send back: gradients,
would-be gradients for sampled labels, and a square root S of the Hessian of c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from fxkfac.errors import DataError, FxkfacError, LossError, NoDataError
from fxkfac.isolation import own_randomness, seed_from
from fxkfac.likelihoods.roots import row_roots
from fxkfac.likelihoods.targets import (
    require_dependence,
    require_finite,
    require_labels,
    require_prediction,
    require_rows,
)
from fxkfac.precision import accurate

Target = Any  # a tensor, as `nll` takes it


class Likelihood:
    """A negative log-likelihood; subclass it and give `nll`, or `distribution`, or both.

    Everything else is derived by autodiff and may be overridden by a formula. Rows of axis 0 must
    be independent: `nll(f, y)[n]` depends on `f[n]` alone (paper, Equation 1 and Section 2.3).

    In all methods `f` is the prediction of a batch, floating and of whatever dtype the model gives,
    and `y` its targets; what is like `f` has its shape and dtype. A site is what has a label of its
    own: one datum, or one position of it.

        class PoissonRate(Likelihood):
            def distribution(self, prediction):
                return torch.distributions.Poisson(prediction.exp())

    Attributes:
        reduction: "mean" or "sum" over what `count` counts.
        scale: The reduction factor R of `reduction="sum"`.
    """

    reduction: str = "mean"
    scale: float = 1.0

    @staticmethod
    def from_distribution(
        fn: Callable[[Tensor], Distribution], reduction: str = "mean"
    ) -> Likelihood:
        """The likelihood of the distribution that `fn` makes of a prediction, rows along axis 0.

        Raises `LossError` for a reduction that is neither "mean" nor "sum", and for what is no
        function, as a distribution by itself.
        """
        return _FromDistribution(fn, reduction)

    # --- what a user gives ---

    def nll(self, prediction: Tensor, target: Target) -> Tensor:
        """c(f_n, y_n) for every row of axis 0, shape [N]: -log r(y_n | f_n) up to a constant."""
        distribution = self.distribution(prediction)
        if isinstance(target, Tensor):
            require_labels(distribution, target)
        return -sum_rows(distribution.log_prob(target))

    def distribution(self, prediction: Tensor) -> Distribution:
        """The model's distribution r(· | f) of the target. Raises `LossError` if none is given."""
        raise LossError(
            f"{type(self).__name__} has no distribution of the target. Define "
            "`distribution(prediction)`, which returns a torch.distributions object. With "
            "`nll(prediction, target)` alone, the fishers 'type-2', 'curvature-propagation', "
            "'empirical' and 'forward-only' work."
        )

    # --- what is derived from it ---

    def criterion(self, f: Tensor, y: Target) -> Tensor:
        """Σ_n c(f_n, y_n), a scalar, without R. Equation 1."""
        rows = self.nll(f, y)
        if not isinstance(rows, Tensor) or rows.shape != f.shape[:1]:
            found = (
                f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            )
            raise LossError(
                f"{type(self).__name__}.nll returned {found}; expected a tensor with one value "
                f"for each row of the prediction, shape {tuple(f.shape[:1])}. Sum over all other "
                "axes, and leave the reduction to `reduction`."
            )
        return rows.sum()

    def count(self, f: Tensor, y: Target) -> float:
        """What `reduction="mean"` divides by, for this batch: counts of batches add up."""
        return float(len(f))

    def ignored(self, f: Tensor, y: Target) -> Tensor | None:
        """Sites whose target counts for nothing, like `f` with event axes of length one."""
        return None

    def ignores(self, y: Target) -> bool:
        """Whether there are such sites."""
        return False

    def reduction_factor(self, count: float) -> float:
        """R of Equation 1, given the count of the whole data set. Raises `NoDataError` at zero."""
        if self.reduction == "sum":
            return self.scale
        if self.reduction != "mean":
            raise LossError(f"reduction is {self.reduction!r}; expected 'mean' or 'sum'.")
        if not 0 < count < math.inf:
            raise NoDataError(
                f"the mean of the loss would divide by {count}; expected a positive number. There "
                "are no data, or every target is ignored or has weight zero."
            )
        return self.scale / count

    def gradient(self, f: Tensor, y: Target) -> Tensor:
        """∇_f c, like `f`: every datum's own gradient, without R."""
        return torch.func.grad(lambda at: self.criterion(at, y))(f.detach())

    def hessian_sqrt(self, f: Tensor, y: Target, v: Tensor) -> Tensor:
        """S v, like `f`, datum by datum: S Sᵀ is the Hessian of c in f. Section 2.5.2.

        Raises `LossError` where c is not convex, `NonFiniteError` where its Hessian is not finite.
        """
        return derived_hessian_sqrt(self, f, y)(v)

    def hessian_columns(self, f: Tensor, y: Target) -> Iterator[Tensor]:
        """Columns v, like `f`, of a square root at all sites at once: Σ v vᵀ is each one's Hessian.

        Any square root will do: there may be fewer columns than those of S.
        """
        S, axes = hessian_root(self, f, y), self.event_axes(f)
        shape = [size if a in axes else 1 for a, size in enumerate(f.shape)]
        numel = torch.Size(shape).numel()
        for unit in torch.eye(numel, dtype=f.dtype, device=f.device):
            yield S(unit.view(shape).expand(f.shape))

    def sample(self, f: Tensor, generator: torch.Generator) -> Target:
        """ỹ drawn from r(· | f), the same for the same state of `generator`. Section 2.3."""
        # torch.distributions knows only the global generator, which is the caller's.
        with own_randomness(seed_from(generator)):
            return self.distribution(f.detach()).sample()

    def sampled_gradient(self, f: Tensor, y: Target, sampled: Target) -> Tensor:
        """The would-be gradient ∇_f c(f, ỹ), times √ of the weight of `y`. Section 2.5.3.

        Raises `LossError` where targets hold more than labels: `nll` reads both alike.
        """
        if isinstance(sampled, Tensor) and sampled.shape[:1] != f.shape[:1]:
            raise LossError(
                f"{type(self).__name__}.sample returned shape {tuple(sampled.shape)}; expected "
                f"labels for each of {len(f)} data along axis 0, which nothing is broadcast to."
            )
        own = type(self).gradient is not Likelihood.gradient
        if not own and isinstance(y, Tensor) and isinstance(sampled, Tensor):
            self._require_alike(f, y, sampled)
        return without_ignored(self, f, y, self.gradient(f, sampled))

    def _require_alike(self, f: Tensor, y: Tensor, sampled: Tensor) -> None:
        """Raise `LossError` where targets hold more than labels do, but for probabilities."""
        are_probabilities = y.shape == f.shape and sampled.shape == (*f.shape[:1], *f.shape[2:])
        are_probabilities &= y.is_floating_point() and not sampled.is_floating_point()
        if sampled.numel() != y.numel() and not are_probabilities:
            raise LossError(
                f"a label of {type(self).__name__} has shape {tuple(sampled.shape)}, the targets "
                f"have {tuple(y.shape)}; expected as many entries: `nll` reads both alike. Where "
                "targets hold more than labels, such as weights, override `sampled_gradient`; or "
                "use the fisher 'type-2' or 'empirical', for which nothing is drawn."
            )

    def labels(self, f: Tensor) -> Iterator[tuple[Tensor, Target]]:
        """Each label value, as (its probability at every site, a target that is it everywhere).

        Raises `LossError` where they cannot be listed.
        """
        raise LossError(
            f"the labels of {type(self).__name__} cannot be enumerated, so there is no exact "
            "fisher='type-1'. 'mc' samples the same Fisher where there is a distribution, 'type-2' "
            "and 'curvature-propagation' take a criterion that is convex, 'empirical' and "
            "'forward-only' any."
        )

    def event_axes(self, f: Tensor) -> tuple[int, ...]:
        """The axes of `f` that belong to one site: one independent term of the criterion."""
        return tuple(range(1, f.ndim))

    def validate(self, f: Tensor, y: Target) -> None:
        """Raise `DataError` if prediction and target do not fit each other or the likelihood."""
        require_prediction(f)
        if isinstance(y, Tensor):
            require_finite(y)
            if y.shape[:1] != f.shape[:1]:
                raise DataError(
                    f"{len(f)} predictions, but targets of shape {tuple(y.shape)}; expected as "
                    "many targets as predictions along axis 0."
                )
        if not (_is_given(self, "nll") or _is_given(self, "distribution")):
            return  # formulas alone; what they lack is named where it is needed
        try:
            with torch.enable_grad():
                rows = self.nll(f.detach().requires_grad_(), y)
            has_rows = isinstance(rows, Tensor) and rows.shape == f.shape[:1]
            if has_rows and not _is_given(self, "gradient"):  # it is derived
                require_dependence(type(self).__name__, rows)
            if isinstance(y, Tensor) and len(f) > 1 and has_rows:
                require_rows(type(self).__name__, self.nll, rows.detach(), f, y)
        except FxkfacError:
            raise
        except ValueError as error:  # torch.distributions: outside of the support
            raise DataError(f"{type(self).__name__} refuses these data: {error}") from error


class _FromDistribution(Likelihood):
    def __init__(self, fn: Callable[[Tensor], Distribution], reduction: str):
        if not callable(fn):
            raise LossError(
                f"Likelihood.from_distribution got a {type(fn).__name__}; expected a function of "
                "the prediction that returns a torch.distributions object, such as "
                "`lambda f: torch.distributions.Normal(f, 1.0)`."
            )
        self.fn, self.reduction = fn, reduction
        self.reduction_factor(1.0)  # refuses an unknown reduction now rather than later

    def distribution(self, prediction: Tensor) -> Distribution:
        found = self.fn(prediction)
        if not isinstance(found, Distribution):
            raise LossError(
                f"the function of Likelihood.from_distribution returns {type(found).__name__}; "
                "expected a torch.distributions object for a prediction."
            )
        return found


def count_of(likelihood: Likelihood, f: Tensor, y: Target) -> float:
    """What `count` says, as a number. Raises `LossError` where it is none."""
    found = likelihood.count(f, y)
    try:
        return float(found)
    # Of no number, one that is too large, and several.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LossError(
            f"{type(likelihood).__name__}.count returned {found!r:.80}; expected a number: what "
            "reduction='mean' divides by, for this batch."
        ) from error


def _is_given(likelihood: Likelihood, method: str) -> bool:
    """Whether a method is the user's own."""
    found, derived = getattr(likelihood, method), getattr(Likelihood, method)
    return getattr(found, "__func__", None) is not derived


def hessian_root(likelihood: Likelihood, f: Tensor, y: Target) -> Callable[[Tensor], Tensor]:
    """v -> S v; a square root that is not given by a formula is found once for all v."""
    if _is_given(likelihood, "hessian_sqrt"):
        return partial(likelihood.hessian_sqrt, f, y)
    return derived_hessian_sqrt(likelihood, f, y)


def derived_hessian_sqrt(
    likelihood: Likelihood, f: Tensor, y: Target
) -> Callable[[Tensor], Tensor]:
    """v -> S v with S = √H, the symmetric square root of the autodiff Hessian of each row.

    Raises:
        LossError, NonFiniteError: As `row_roots`.
    """
    name = type(likelihood).__name__
    S = row_roots(name, lambda at: likelihood.criterion(at, y), accurate(f.detach()))

    def apply(v: Tensor) -> Tensor:
        rows = v.reshape(len(v), -1, 1).to(S.dtype)
        return without_ignored(likelihood, f, y, (S @ rows).reshape(v.shape).to(v.dtype))

    return apply


def without_ignored(likelihood: Likelihood, f: Tensor, y: Target, g: Tensor) -> Tensor:
    """What is like `f`, with zeros at sites that count for nothing: there may be rounding."""
    ignored = likelihood.ignored(f, y)
    return g if ignored is None else g.masked_fill(ignored, 0.0)


def sum_rows(values: Tensor) -> Tensor:
    """Sum over all axes but axis 0: [N, ...] -> [N]; a scalar becomes [1]."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values.reshape(-1)
