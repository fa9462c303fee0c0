"""Dense curvature matrices by autodiff: the ground truth. Paper, Definitions 12, 13, 19-21.

All carry the loss's own R, which stands where the paper's Fishers have 1/N (Section 2.5.3).
All take a model, a loss, data, and `names`, which choose the block:

- a string: the block of that parameter;
- a list: the matrix of these parameters joined, each flattened on its own, in that order;
- a tuple of two: the mixed block, rows of the first and columns of the second;
- `None`: all parameters that `fxkfac.functional.bind` selects, joined.

`params` is the dict of tensors of a functional model, or replaces tensors of a module. `vec` is
"rvec" (row-major, PyTorch's order) or "cvec". Data are one (inputs, targets), or an iterable of
such pairs, which run one after the other and count as one data set: R is that of all data. A datum
owns an equal part of its batch's prediction along axis 0. Nothing of the user's changes: no
gradient, buffer, mode or RNG state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from einops import einsum
from torch import Tensor

from fxkfac.errors import OptionError
from fxkfac.exact.data import Data
from fxkfac.exact.functions import jacobian_rows, order, require_vec, vjp
from fxkfac.exact.problem import (
    Loss,
    Middle,
    Model,
    Problem,
    bind_for,
    canonical,
    loss_of,
    middle_of_fisher,
    pose,
)
from fxkfac.functional import Params
from fxkfac.isolation import full_precision
from fxkfac.linalg import rvec

Names = str | list[str] | tuple[str, str] | None


@full_precision()
def hessian(
    model: Model,
    loss: Loss,
    data: Data,
    names: Names = None,
    params: Params | None = None,
    vec: str = "rvec",
) -> Tensor:
    """The Hessian of the loss, [rows, columns]. Paper, Definitions 12, 13, Section 2.5.1.

    Args:
        model: A module, or a function `f(params, *inputs)`.
        loss: As of `fxkfac.kfac`; its reduction decides R.
        data: One (inputs, targets), or an iterable of such pairs, which counts as one data set;
            N of a batch is the length of axis 0 of its first input.
        names: Which block: a name; a list, for the matrix of these parameters joined; a tuple of
            two, for the mixed block, rows of the first and columns of the second; or `None`, for
            all parameters that require gradients.
        params: The nested tensors of a function; or tensors in the place of a module's own.
        vec: `"rvec"`, the order of stored entries (row-major), or `"cvec"` (column-major).

    Returns:
        The matrix, in the dtype and on the device of the prediction.

    Raises:
        UnknownParameter, ParameterError: No parameter has this name, or one is named twice, or has
            no derivative.
        DataError: There are no data, or targets that do not fit the prediction.
        LossError: The loss has no likelihood here.
        NonFiniteError: The prediction holds NaN or Inf.
        OptionError: There is no such `vec`, or a tuple of `names` is not of two.
        CaptureError: `torch.inference_mode()` is on.
        UnsupportedUse: PyTorch cannot differentiate the backward pass of an op of model or loss.
    """
    block = _block(model, loss, data, names, params, vec)
    leaves = block.problems[0].prediction.of  # those of all batches
    with torch.enable_grad():
        L = loss_of(block.problems)
        slopes = vjp(L, leaves(block.rows), torch.ones_like(L), create_graph=True)
        slope = torch.cat([rvec(g) for g in slopes])
    return block.arrange(jacobian_rows(slope, leaves(block.columns)))


@full_precision()
def ggn(
    model: Model,
    loss: Loss,
    data: Data,
    names: Names = None,
    params: Params | None = None,
    vec: str = "rvec",
) -> Tensor:
    """The generalised Gauss-Newton matrix Jᵀ (H_f L) J, [rows, columns]. Paper, Definition 19.

    H_f L is the loss itself, differentiated twice (Section 2.5.2). Where it does not depend on the
    labels, as for the torch losses without weights, this is the type-2 Fisher (Section 2.5.4).

    Args:
        model, loss, data, names, params, vec: As of `fxkfac.exact.hessian`.

    Raises:
        DataError: N data in a prediction that is not N equal parts along axis 0.
        FxkfacError: As `fxkfac.exact.hessian`.
    """
    block = _block(model, loss, data, names, params, vec)
    return block.sandwich(Problem.loss_hessian)


@full_precision()
def type1_fisher(
    model: Model,
    loss: Loss,
    data: Data,
    names: Names = None,
    params: Params | None = None,
    vec: str = "rvec",
) -> Tensor:
    """R Σ_n Jᵀ E[∇c ∇cᵀ] J over the model's own labels, exact, [rows, columns]. Section 2.5.3.

    Labels are enumerated; for the square loss the expectation is I. Class weights of the true
    target carry over, so that it equals the GGN for the torch losses (Section 2.5.4).

    Args:
        model, loss, data, names, params, vec: As of `fxkfac.exact.hessian`.

    Raises:
        LossError: The labels of the likelihood cannot be enumerated.
        FxkfacError: As `fxkfac.exact.ggn`.
    """
    block = _block(model, loss, data, names, params, vec)
    return block.sandwich(middle_of_fisher("type-1", 1, None))


@full_precision()
def mc_fisher(
    model: Model,
    loss: Loss,
    data: Data,
    names: Names = None,
    params: Params | None = None,
    vec: str = "rvec",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The type-1 Fisher with labels drawn for every datum, [rows, columns]. Paper, Definition 20.

    Args:
        model, loss, data, names, params, vec: As of `fxkfac.exact.hessian`.
        mc_samples: Number of labels drawn for each datum.
        generator: Where they are drawn from; a new one by default, the same in every call.

    Raises:
        LossError: The likelihood has no distribution.
        OptionError: `mc_samples` is less than one.
        FxkfacError: As `fxkfac.exact.ggn`.
    """
    block = _block(model, loss, data, names, params, vec)
    return block.sandwich(middle_of_fisher("mc", mc_samples, generator))


@full_precision()
def empirical_fisher(
    model: Model,
    loss: Loss,
    data: Data,
    names: Names = None,
    params: Params | None = None,
    vec: str = "rvec",
) -> Tensor:
    """R Σ_n ∇c_n ∇c_nᵀ with the data's own labels, [rows, columns]. Paper, Definition 21.

    Args:
        model, loss, data, names, params, vec: As of `fxkfac.exact.hessian`.

    Raises:
        FxkfacError: As `fxkfac.exact.ggn`.
    """
    block = _block(model, loss, data, names, params, vec)
    return block.sandwich(middle_of_fisher("empirical", 1, None))


@dataclass(frozen=True)
class _Block:
    """Which block of a matrix is asked for, and in which order its entries go."""

    problems: list[Problem]
    rows: list[str]
    columns: list[str]
    vec: str

    def arrange(self, matrix: Tensor) -> Tensor:
        """From rvec order, rows and columns, to the order asked for."""
        leaves = self.problems[0].prediction.of
        rows, columns = (
            order([t.shape for t in leaves(names)], self.vec) for names in (self.rows, self.columns)
        )
        return matrix[rows.to(matrix.device)][:, columns.to(matrix.device)].detach()

    def sandwich(self, middle: Callable[[Problem], Middle]) -> Tensor:
        """C = Σ_n J_nᵀ [•]_n J_n over all batches, where `middle` multiplies with every [•]_n."""
        parts = (self._of_batch(problem, middle(problem)) for problem in self.problems)
        return self.arrange(reduce(torch.add, parts))

    def _of_batch(self, problem: Problem, middle: Middle) -> Tensor:
        f, N = problem.prediction.f, problem.size
        dim_f = f.numel() // N
        e = torch.eye(dim_f, dtype=f.dtype, device=f.device)
        blocks = middle(e.unsqueeze(1).expand(dim_f, N, dim_f))  # [•]_n e for each n and e
        J_rows = _jacobians(problem, self.rows)
        J_columns = J_rows if self.rows == self.columns else _jacobians(problem, self.columns)
        CJ = einsum(blocks, J_columns, "e batch f, batch f d -> batch e d")
        return einsum(J_rows, CJ, "batch e d1, batch e d2 -> d1 d2")


def _jacobians(problem: Problem, names: list[str]) -> Tensor:
    """J_n of every datum, [N, dim F, dim θ], in rvec order."""
    prediction = problem.prediction
    J = jacobian_rows(prediction.f, prediction.of(names)).to(prediction.f.dtype)
    return J.unflatten(0, (problem.size, -1))  # there may be no columns


def _block(
    model: Model, loss: Loss, data: Data, names: Names, params: Params | None, vec: str
) -> _Block:
    require_vec(vec)
    listed = [names] if isinstance(names, str) else names
    bound = bind_for(model, params, listed)
    if isinstance(listed, tuple):
        if len(listed) != 2:
            raise OptionError(
                f"names is a tuple of {len(listed)}; expected two, for the mixed block of rows and "
                "columns. Pass a list for the matrix of all of them joined."
            )
        rows, columns = (canonical(bound, [name]) for name in listed)
    else:
        rows = columns = canonical(bound, bound.selected if listed is None else listed)
    problems = pose(bound, dict.fromkeys([*rows, *columns]), loss, data)
    return _Block(problems, rows, columns, vec)
