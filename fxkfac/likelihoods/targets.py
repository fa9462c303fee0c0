"""Whether predictions and targets fit each other: what does not is refused before it is summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from fxkfac.errors import DataError, LossError
from fxkfac.isolation import is_finite


def require_tensors(f: Any, y: Any) -> None:
    """Raise `DataError` unless `f` is a prediction and `y` a tensor."""
    require_prediction(f)
    if not isinstance(y, Tensor):
        raise DataError(f"the targets are a {type(y).__name__}; expected a tensor. Convert them.")


def require_prediction(f: Any) -> None:
    """Raise `DataError` unless `f` is a floating tensor with at least one axis and element."""
    if not isinstance(f, Tensor):
        raise DataError(
            f"the prediction is of type {type(f).__name__}; expected a tensor. Wrap the model in a "
            "function that returns what the loss takes."
        )
    if not f.is_floating_point() or f.ndim == 0 or f.numel() == 0:
        raise DataError(
            f"the prediction has dtype {f.dtype} and shape {tuple(f.shape)}; expected a floating "
            "tensor with data along axis 0. Pass at least one datum."
        )


def require_finite(y: Tensor) -> None:
    """Raise `DataError` if a floating target holds NaN or Inf."""
    if y.is_floating_point() and not is_finite(y):
        wrong = ~y.isfinite()
        place = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"{int(wrong.sum())} of {y.numel()} target values are NaN or Inf, the first at "
            f"{place}; expected finite numbers. Remove or impute these data."
        )


def require_floating_like(f: Tensor, y: Tensor, loss: str) -> None:
    """Raise `DataError` unless `y` is floating, finite, and of the shape of `f`."""
    if y.shape != f.shape or not y.is_floating_point():
        raise DataError(
            f"targets of dtype {y.dtype} and shape {tuple(y.shape)} for {loss} of a prediction of "
            f"shape {tuple(f.shape)}; expected floating targets of the prediction's shape. Convert "
            "them by `.float()`, and reshape them rather than let them broadcast."
        )
    require_finite(y)


def require_labels(distribution: Distribution, target: Tensor) -> None:
    """Raise `DataError` unless there is a label for each site: nothing is broadcast."""
    expected = distribution.batch_shape + distribution.event_shape
    if target.shape != expected:
        raise DataError(
            f"targets of shape {tuple(target.shape)} for a {type(distribution).__name__} of shape "
            f"{tuple(expected)}; expected one label for each. Reshape them rather than let them "
            "broadcast."
        )


def require_dependence(name: str, rows: Tensor) -> None:
    """Raise `LossError` unless autograd sees that values depend on the prediction."""
    if not rows.requires_grad:
        raise LossError(
            f"{name}.nll does not depend on the prediction, as far as autograd sees; expected one "
            "that does. Compute it of the prediction itself, not of what is detached or no "
            "longer PyTorch's."
        )


def require_rows(
    name: str, nll: Callable[[Tensor, Tensor], Tensor], rows: Tensor, f: Tensor, y: Tensor
) -> None:
    """Raise `LossError` unless the first row and the last are worth the same by themselves.

    What adds up along the data, as a Cox likelihood does, leaves one of the two as it is. What has
    another shape for one row alone, as where each datum has a weight, tells nothing.
    """
    tolerance = torch.finfo(f.dtype).eps ** 0.5
    for place, row in (("first", slice(0, 1)), ("last", slice(-1, None))):
        alone = nll(f[row].detach(), y[row])
        if alone.shape == (1,) and not torch.allclose(
            alone, rows[row], rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise LossError(
                f"{name}.nll gives {rows[row].item():.4g} for the {place} of {len(f)} data, and "
                f"{alone.item():.4g} for it alone; expected the same, since data are independent. "
                f"Look for targets that broadcast: they have shape {tuple(y.shape)}, and the "
                f"prediction {tuple(f.shape)}; and for what goes by a datum's place."
            )
