"""The likelihoods of torch's losses in closed form, and which loss has which.

Paper, Examples 1, 3, 11 and 13, and for the cross-entropy those in `categorical`.

In: `nn.MSELoss`, `nn.CrossEntropyLoss`, `nn.BCEWithLogitsLoss`, or a `Likelihood` of the user's.
Out: a `Likelihood` with R Σ_n c(f_n, y_n) = loss(f, y) for every option of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxkfac.errors import DataError, LossError
from fxkfac.isolation import generator_on
from fxkfac.likelihoods.base import Likelihood, count_of, sum_rows
from fxkfac.likelihoods.categorical import Categorical
from fxkfac.likelihoods.closed_form import ClosedForm
from fxkfac.likelihoods.targets import require_floating_like, require_tensors
from fxkfac.likelihoods.wording import said, worded
from fxkfac.precision import accurate

__all__ = ["Bernoulli", "Categorical", "Gaussian", "likelihood_of"]


def likelihood_of(loss: Any) -> Likelihood:
    """The likelihood that a loss is the negative logarithm of.

    Raises:
        LossError: The loss has no likelihood here, or `reduction="none"`.
    """
    if isinstance(loss, Likelihood):
        return loss
    for kind, make in TORCH_LOSSES.items():
        # With a forward of its own, or hooks, it is another loss.
        if isinstance(loss, kind) and _is_plain(loss, kind):
            if loss.reduction not in ("mean", "sum"):
                raise LossError(
                    f"{kind.__name__} has reduction={loss.reduction!r}; expected 'mean' or 'sum', "
                    "since curvature is that of one scalar."
                )
            return make(loss)
    name = loss.__name__ if hasattr(loss, "__name__") else type(loss).__name__
    raise LossError(
        f"no likelihood is known for the loss {name}. There are: an instance of nn.MSELoss, "
        "nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, as torch has them, without hooks. For another "
        "one, subclass "
        "fxkfac.Likelihood and define `nll(prediction, target)`, or pass "
        "Likelihood.from_distribution(fn), where fn turns a prediction into a torch.distributions "
        "object."
    )


def _is_plain(loss: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a loss does what its class in torch does."""
    hooks = (loss._forward_pre_hooks, loss._forward_hooks, loss._backward_hooks)
    same = type(loss).forward is kind.forward and "forward" not in vars(loss)
    return same and not any(hooks) and not loss._backward_pre_hooks


def loss_value(loss: Any, prediction: Tensor, targets: Any) -> Tensor:
    """The loss as a scalar, with its reduction: R Σ_n c(f_n, y_n)."""
    if not isinstance(loss, Likelihood):
        return loss(prediction, targets)
    factor = loss.reduction_factor(count_of(loss, prediction.detach(), targets))
    return factor * loss.criterion(prediction, targets)


def loss_text(loss: Any) -> str:
    """A loss with all of its options: equal for two losses that are the same function."""
    if not isinstance(loss, nn.Module):
        loss = likelihood_of(loss)  # which says what is wrong with any other
    options = vars(loss) if isinstance(loss, Likelihood) else _module_options(loss)
    return f"{worded(type(loss))}({said(options)})"


def _module_options(loss: nn.Module) -> dict[str, Any]:
    public = {k: v for k, v in vars(loss).items() if not k.startswith("_") and k != "training"}
    return public | dict(loss.named_buffers())


class Gaussian(ClosedForm):
    """nn.MSELoss: c = ½‖f - y‖², a Gaussian with unit covariance. Every element is a site.

    Paper, Examples 1 and 3; its Hessian in f is I (Example 8).
    """

    scale = 2.0

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction

    def nll(self, prediction: Tensor, target: Tensor) -> Tensor:
        """½‖f_n - y_n‖², shape [N]. Example 1."""
        return sum_rows((accurate(prediction) - target).square() / 2)

    def count(self, f: Tensor, y: Tensor) -> float:
        """N · dim Y. Example 1."""
        return float(f.numel())

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """f - y. Example 13."""
        return (f - y).to(f.dtype)

    def hessian_sqrt(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """S = I. Example 11."""
        return v

    def noise(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """From N(0, I)."""
        return self.room(f).normal_(generator=generator_on(f.device, generator))

    def label(self, f: Tensor, noise: Tensor) -> Tensor:
        """ỹ ~ N(f, I), Example 3; not rounded to half precision, or else f - ỹ would be."""
        return accurate(f) + noise

    def event_axes(self, f: Tensor) -> tuple[int, ...]:
        """One element."""
        return ()

    def validate(self, f: Tensor, y: Tensor) -> None:
        """Targets are finite floating numbers, in the prediction's shape."""
        require_tensors(f, y)
        require_floating_like(f, y, "MSELoss")


class Bernoulli(ClosedForm):
    """nn.BCEWithLogitsLoss: c = -w (π y log p + (1 - y) log(1 - p)), with p = sigmoid(f).

    w is `weight`, π is `pos_weight`; both broadcast to `f`. Every element is a site.
    """

    def __init__(
        self,
        reduction: str = "mean",
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ):
        for name, t in {"weight": weight, "pos_weight": pos_weight}.items():
            if t is not None and (t < 0).any():
                raise LossError(
                    f"BCEWithLogitsLoss has {name}={t.min().item():g}; expected weights ≥ 0, since "
                    "a negative one makes the loss concave."
                )
        self.reduction, self.weight, self.pos_weight = reduction, weight, pos_weight

    def nll(self, prediction: Tensor, target: Tensor) -> Tensor:
        """-w (π y log p + (1 - y) log(1 - p)), summed over each row, shape [N]."""
        f = accurate(prediction)
        w, π = (None if t is None else t.to(f) for t in (self.weight, self.pos_weight))
        elements = F.binary_cross_entropy_with_logits(
            f, target.to(f), w, reduction="none", pos_weight=π
        )
        return sum_rows(elements)

    def count(self, f: Tensor, y: Tensor) -> float:
        """N · dim Y: weights do not enter the mean."""
        return float(f.numel())

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """w ((1 - y) p - π y (1 - p)), which is p - y without weights."""
        w, π, z = self._weights(f)
        return (w * ((1 - y) * z.sigmoid() - π * y * (-z).sigmoid())).to(f.dtype)

    def hessian_sqrt(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """S = √(w (π y + 1 - y) p (1 - p)); 1 - p as sigmoid(-f), which does not cancel."""
        z = accurate(f)
        return ((self._site_weight(f, y) * z.sigmoid() * (-z).sigmoid()).sqrt() * v).to(v.dtype)

    def noise(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in [0, 1)."""
        return self.room(f).uniform_(generator=generator_on(f.device, generator))

    def label(self, f: Tensor, noise: Tensor) -> Tensor:
        """ỹ ~ Bernoulli(p), as 0 and 1."""
        p = accurate(f).sigmoid()
        return (noise < p).to(p.dtype)

    def sampled_gradient(self, f: Tensor, y: Tensor, sampled: Tensor) -> Tensor:
        """√(w (π y + 1 - y)) (p - ỹ)."""
        residual = Bernoulli().gradient(accurate(f), sampled)  # p - ỹ
        return (self._site_weight(f, y).sqrt() * residual).to(f.dtype)

    def labels(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """0 with 1 - p, and 1 with p."""
        z = accurate(f)
        yield (-z).sigmoid(), torch.zeros_like(z)
        yield z.sigmoid(), torch.ones_like(z)

    def event_axes(self, f: Tensor) -> tuple[int, ...]:
        """One element."""
        return ()

    def validate(self, f: Tensor, y: Tensor) -> None:
        """Targets are probabilities in the prediction's shape."""
        require_tensors(f, y)
        require_floating_like(f, y, "BCEWithLogitsLoss")
        wrong = y[(y < 0) | (y > 1)]
        if wrong.numel():
            raise DataError(
                f"{wrong.numel()} of {y.numel()} targets lie outside [0, 1], among them "
                f"{wrong.unique()[:3].tolist()}; BCEWithLogitsLoss expects probabilities."
            )
        for name, t in {"weight": self.weight, "pos_weight": self.pos_weight}.items():
            if t is not None and not _broadcasts(t.shape, f.shape):
                raise DataError(
                    f"{name} of shape {tuple(t.shape)} does not broadcast to the prediction's "
                    f"shape {tuple(f.shape)}."
                )

    def _weights(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = accurate(f)
        one = z.new_ones(())
        w, π = (one if t is None else t.to(z) for t in (self.weight, self.pos_weight))
        return w, π, z

    def _site_weight(self, f: Tensor, y: Tensor) -> Tensor:
        w, π, _ = self._weights(f)
        return w * (π * y + 1 - y)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in sizes)


# They draw from the generator that they are given; a class that someone makes of them may not.
BUILT_IN = frozenset({Gaussian, Bernoulli, Categorical})

TORCH_LOSSES: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.MSELoss: lambda loss: Gaussian(loss.reduction),
    nn.CrossEntropyLoss: lambda loss: Categorical(
        loss.reduction, loss.weight, loss.ignore_index, loss.label_smoothing
    ),
    nn.BCEWithLogitsLoss: lambda loss: Bernoulli(loss.reduction, loss.weight, loss.pos_weight),
}
