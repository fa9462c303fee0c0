"""Products with Jacobians and curvature matrices that never form them.

Paper, Definitions 5, 6, 11 and 18, and products with the Fishers of Definitions 20 and 21.
A `vector` is a dict of tensors shaped like parameters, nested as the parameters are. Its names
choose the block, and a result has the same names. `params` is the dict of tensors of a functional
model, or replaces tensors of a module. Nothing of the user's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxkfac.errors import DataError, ParameterError
from fxkfac.exact.data import Data
from fxkfac.exact.functions import vjp
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
    predict,
)
from fxkfac.functional import FunctionalModel, Inputs, Params
from fxkfac.isolation import full_precision
from fxkfac.parameters import flatten_names, nest_names


@full_precision()
def jacobian_vector_product(
    model: Model, inputs: Inputs, vector: Params, params: Params | None = None
) -> Tensor:
    """J v: how the prediction changes along a vector, in its own shape. Paper, Definition 6.

    Args:
        model, params: As of `fxkfac.exact.hessian`.
        inputs: One batch.
        vector: Tensors in the shapes of some parameters, nested as these are.

    Raises:
        UnknownParameter, ParameterError: No parameter has this name, or a tensor another shape.
        NonFiniteError: The prediction holds NaN or Inf.
    """
    bound, tangents = _tangents(model, vector, params)
    (prediction,) = predict(bound, tangents, [inputs])
    return prediction.jvp(tangents)


@full_precision()
def vector_jacobian_product(
    model: Model,
    inputs: Inputs,
    cotangent: Tensor,
    names: str | list[str] | None = None,
    params: Params | None = None,
) -> dict[str, Tensor]:
    """Jᵀ u, by name, in the shapes of the parameters. Paper, Definition 5.

    Args:
        model, params: As of `fxkfac.exact.hessian`.
        inputs: One batch.
        cotangent: u, in the prediction's shape.
        names: A parameter, or a list; by default all that require gradients.

    Raises:
        UnknownParameter: No parameter has this name.
        DataError: The cotangent has another shape than the prediction.
        NonFiniteError: The prediction holds NaN or Inf.
    """
    listed = [names] if isinstance(names, str) else names
    bound = bind_for(model, params, listed)
    chosen = canonical(bound, bound.selected if listed is None else listed)
    (prediction,) = predict(bound, chosen, [inputs])
    if not isinstance(cotangent, Tensor) or cotangent.shape != prediction.f.shape:
        of = isinstance(cotangent, Tensor)
        found = f"has shape {tuple(cotangent.shape)}" if of else f"is {type(cotangent).__name__}"
        raise DataError(
            f"the cotangent {found}; expected a tensor of the prediction's shape, "
            f"{tuple(prediction.f.shape)}."
        )
    pulled = prediction.vjp(cotangent)
    return dict(zip(chosen if listed is None else listed, pulled.values(), strict=True))


@full_precision()
def hessian_vector_product(
    model: Model, loss: Loss, data: Data, vector: Params, params: Params | None = None
) -> dict[str, Any]:
    """H v with the Hessian of the loss. Paper, Definition 11.

    Args:
        model, loss, data, params: As of `fxkfac.exact.hessian`.
        vector: Tensors in the shapes of some parameters, nested as these are.

    Returns:
        Tensors under the names, and in the nesting, of the vector.

    Raises:
        FxkfacError: As `fxkfac.exact.hessian`; `ParameterError` for a tensor of another shape.
    """
    bound, tangents = _tangents(model, vector, params)
    problems = pose(bound, tangents, loss, data)
    leaves = problems[0].prediction.of(tangents)  # those of all batches
    with torch.enable_grad():
        L = loss_of(problems)
        slopes = vjp(L, leaves, torch.ones_like(L), create_graph=True)
        # ⟨∇L, v⟩ differentiated once more is H v
        directional = [(g * v).sum() for g, v in zip(slopes, tangents.values(), strict=True)]
        slope = torch.stack(directional).sum()
    products = vjp(slope, leaves, torch.ones_like(slope))
    return _named(bound, dict(zip(tangents, products, strict=True)), vector)


@full_precision()
def ggn_vector_product(
    model: Model, loss: Loss, data: Data, vector: Params, params: Params | None = None
) -> dict[str, Any]:
    """G v with the GGN: a JVP, the loss Hessian, a VJP. Paper, Definition 18.

    Args:
        model, loss, data, params: As of `fxkfac.exact.hessian`.
        vector: Tensors in the shapes of some parameters, nested as these are.

    Returns:
        Tensors under the names, and in the nesting, of the vector.

    Raises:
        FxkfacError: As `fxkfac.exact.hessian`; `ParameterError` for a tensor of another shape.
    """
    bound, tangents = _tangents(model, vector, params)
    problems = pose(bound, tangents, loss, data)
    return _sandwich(bound, problems, Problem.loss_hessian, tangents, vector)


@full_precision()
def fisher_vector_product(
    model: Model,
    loss: Loss,
    data: Data,
    vector: Params,
    params: Params | None = None,
    fisher: str = "type-1",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """F v, with F the Fisher of any flavour. Paper, Definitions 20 and 21.

    Args:
        model, loss, data, vector, params: As of `fxkfac.exact.ggn_vector_product`.
        fisher: "type-1" (exact expectation over labels), "mc", "empirical"; "type-2" and
            "curvature-propagation" go through the likelihood's S. "forward-only" has no matrix.
        mc_samples: Number of labels drawn for each datum, where they are drawn.
        generator: Where they are drawn from; a new one by default, the same in every call.

    Raises:
        OptionError: There is no such flavour, or it has no matrix; `mc_samples` is less than one.
        LossError: The likelihood lacks what the flavour needs.
        DataError: N data in a prediction that is not N equal parts along axis 0.
        FxkfacError: As `fxkfac.exact.ggn_vector_product`.
    """
    bound, tangents = _tangents(model, vector, params)
    problems = pose(bound, tangents, loss, data)
    middle = middle_of_fisher(fisher, mc_samples, generator)
    return _sandwich(bound, problems, middle, tangents, vector)


def _sandwich(
    bound: FunctionalModel,
    problems: list[Problem],
    middle: Callable[[Problem], Middle],
    tangents: dict[str, Tensor],
    vector: Params,
) -> dict[str, Any]:
    """Jᵀ [•] J v, from right to left, summed over all batches."""
    total: dict[str, Tensor] = {}
    for problem in problems:
        Jv = problem.prediction.jvp(tangents)
        CJv = middle(problem)(Jv.unsqueeze(0)).squeeze(0)
        for name, part in problem.prediction.vjp(CJv).items():
            total[name] = total[name] + part if name in total else part
    return _named(bound, total, vector)


def _tangents(
    model: Model, vector: Params, params: Params | None
) -> tuple[FunctionalModel, dict[str, Tensor]]:
    """Bind the model; the vector by canonical names."""
    flat = flatten_names(vector)
    bound = bind_for(model, params, flat)
    tangents = dict(zip(canonical(bound, flat), flat.values(), strict=True))
    for name, t in tangents.items():
        if t.shape != bound.tensors[name].shape:
            raise ParameterError(
                f"vector[{name!r}] has shape {tuple(t.shape)}; expected that of the parameter, "
                f"{tuple(bound.tensors[name].shape)}."
            )
    return bound, tangents


def _named(bound: FunctionalModel, products: Mapping[str, Tensor], like: Params) -> dict[str, Any]:
    """The products under the names, and in the nesting, of the user's vector."""
    flat = {name: products[bound.resolve(name)].detach() for name in flatten_names(like)}
    return nest_names(flat, like)
