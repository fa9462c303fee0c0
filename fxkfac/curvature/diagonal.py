"""The exact diagonal or dense block, for parameters that have no normal form.

G_{n,c} = ∂ ⟨▲_{n,c}, f_n⟩ / ∂θ,   diag C = R Σ_n Σ_c G²,   C = R Σ_n Σ_c vec(G) vec(G)ᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxkfac.curvature.perdatum import zero_moment
from fxkfac.curvature.together import enlarged, reduced
from fxkfac.errors import BatchAxisError, FxkfacError
from fxkfac.functional import Inputs
from fxkfac.graph.deviation import gradient_errors, relative_error
from fxkfac.graph.digits import tolerance_of_parts
from fxkfac.graph.front_ends.capture import Captured
from fxkfac.graph.program import Program
from fxkfac.graph.tapped import Run
from fxkfac.isolation import without_graph


def _of_each(
    function: Callable[..., Any], in_dims: Sequence[int | None], is_right: Callable[..., bool]
) -> Callable[..., Any]:
    """A function of one datum, for all of them at once.

    One by one where an op has no rule for that, or a wrong one, as PyTorch 2.13's for `cdist` is:
    `is_right` looks at a result and what it was made of.
    """
    at_once, works = vmap(function, tuple(in_dims), randomness="same"), True

    def call(*given: Any) -> Any:
        nonlocal works
        if works:
            try:
                found = at_once(*given)
                if is_right(found, *given):
                    return found
            except RuntimeError:  # in torch's words for that op, or for one inside
                pass
            works = False
        return _one_by_one(function, in_dims, *given)

    return call


def _one_by_one(function: Callable[..., Any], in_dims: Sequence[int | None], *given: Any) -> Any:
    """What `vmap` gives, without it."""
    n = next(t.shape[a] for t, a in zip(given, in_dims, strict=True) if a is not None)
    each = [
        function(*(t if a is None else t.select(a, k) for t, a in zip(given, in_dims, strict=True)))
        for k in range(n)
    ]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *each)


@sdpa_kernel(SDPBackend.MATH)  # vmap would run the fused attention datum by datum, and say so
def gradient_moments(
    program: Program,
    run: Run,
    state: Mapping[str, Tensor],
    inputs: Inputs,
    structures: Mapping[str, str],
    vectors: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Σ_n Σ_c G² or Σ_n Σ_c vec(G) vec(G)ᵀ for the named parameters, without R.

    Args:
        program: The traced program.
        run: Its run on the batch.
        state: All parameters and buffers.
        inputs: The batch.
        structures: The parameters, and "diagonal" or "dense" for each.
        vectors: The backpropagated vectors ▲, of the prediction's shape.

    Raises:
        BatchAxisError: The data are coupled, as by batch norm in train mode, so that no gradient
            is one datum's own.
    """
    signature = program.signature.with_constants(inputs)
    data, axes = [without_graph(t) for t in signature.tensors(inputs)], signature.axes
    first = signature.inputs(signature.permute(data, torch.tensor([0], device="cpu")))
    captured = _for_one_datum(program, first)

    def of_one(chosen: Mapping[str, Tensor], *datum: Tensor) -> Tensor:
        single = [t if a is None else t.unsqueeze(a) for t, a in zip(datum, axes, strict=True)]
        arguments = captured.arguments({**state, **chosen})
        prediction: Tensor = captured.module(*arguments, *single)
        return prediction.flatten()

    chosen = {name: state[name] for name in structures}
    total = {
        name: zero_moment(state[name].shape, kind, state[name]) for name, kind in structures.items()
    }
    own, lowest = by_datum(run, run.prediction.detach()), run.tapped.captured.lowest
    own_gradient = grad(lambda p, v, *datum: (of_one(p, *datum) * v).sum())

    def is_own(found: Tensor, *_: Any) -> bool:
        alike = found.shape == own.shape
        return alike and relative_error(found, own) <= tolerance_of_parts(own, lowest)

    def are_own(found: Mapping[str, Tensor], chosen: Any, vectors: Tensor, *data: Tensor) -> bool:
        last = [t if a is None else t.select(a, -1) for t, a in zip(data, axes, strict=True)]
        expected = partial(own_gradient, chosen, vectors[-1], *last)
        key = ("all at once", tuple(structures), own.device, own.dtype)
        compared = partial(_are_equal, {n: g[-1] for n, g in found.items()}, expected, lowest)
        return run.tapped.once(key, compared)

    if not is_own(_of_each(of_one, (None, *axes), is_own)(chosen, *data)):
        raise BatchAxisError(f"a datum by itself gives another prediction {COUPLED}")
    per_datum = _of_each(own_gradient, (None, 0, *axes), are_own)
    for vector in vectors:
        sent, power = enlarged(vector, run.tapped.captured.underflows)
        sent = by_datum(run, sent)
        gradients = per_datum(chosen, sent, *data)
        for name, kind in structures.items():
            G = reduced(gradients[name], power).to(total[name].dtype)
            total[name] = total[name] + _moment(G.reshape(len(G), -1), kind, total[name])
    return total


def _moment(G: Tensor, kind: str, like: Tensor) -> Tensor:
    """Of the gradients of all data, one in each row."""
    return G.mT @ G if kind == "dense" else G.square().sum(0).view_as(like)


def _are_equal(
    found: Mapping[str, Tensor],
    expected: Callable[[], Mapping[str, Tensor]],
    lowest: torch.dtype,
) -> bool:
    """Whether gradients are those of a datum by itself."""
    alone = expected()
    if any(found[name].shape != t.shape for name, t in alone.items()):
        return False
    errors = gradient_errors(found, alone, lowest)
    return all(errors[name] <= tolerance_of_parts(t, lowest) for name, t in alone.items())


COUPLED = (
    "than within its batch, so its gradient is not its own; is batch norm in train mode? Call "
    "model.eval() before tracing, or trace with unsupported='skip'."
)


def _for_one_datum(program: Program, inputs: Inputs) -> Captured:
    """A graph that is good for a batch of one."""
    try:
        return program.at(inputs)[0].captured
    except FxkfacError:
        raise
    except Exception as error:  # the model's own, which may want more than one datum
        raise BatchAxisError(
            f"a datum by itself gives {error}, another result {COUPLED}"
        ) from error


def by_datum(run: Run, t: Tensor) -> Tensor:
    """A tensor of the prediction's shape as (N, dim F)."""
    if run.n == 1:  # the axis may have been squeezed
        return t.reshape(1, -1)
    if run.tapped.prediction is None:
        raise BatchAxisError(
            f"no one axis of the prediction {tuple(t.shape)} holds the data in their order; "
            "return a prediction with one part for each datum, and draw no random numbers on the "
            "way to it but by dropout; or take fisher='mc' or 'empirical', which need no such axis."
        )
    axis, outer, inner = run.tapped.prediction
    return t.unflatten(axis, (outer, run.n, inner)).movedim(axis + 1, 0).flatten(1)


def positions_in_datum(run: Run) -> Tensor:
    """For every entry of the prediction, its position within its own datum, 0 .. dim F − 1."""
    shape = run.prediction.shape
    numbers = torch.arange(shape.numel(), device=run.prediction.device).view(shape)
    order = by_datum(run, numbers)  # (N, dim F), which entry is where
    positions = torch.empty_like(numbers).flatten()
    positions[order.flatten()] = torch.arange(order.shape[1], device=order.device).repeat(run.n)
    return positions.view(shape)
