"""The exact diagonal or dense block, for parameters that have no normal form.

G_{n,c} = ∂ ⟨▲_{n,c}, f_n⟩ / ∂θ,   diag C = R Σ_n Σ_c G²,   C = R Σ_n Σ_c vec(G) vec(G)ᵀ
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxkfac.curvature.perdatum import zero_moment
from fxkfac.curvature.together import enlarged, reduced
from fxkfac.errors import BatchAxisError, FxkfacError, UnsupportedUse
from fxkfac.functional import Inputs
from fxkfac.graph.deviation import gradient_errors, relative_error
from fxkfac.graph.digits import tolerance_of_parts
from fxkfac.graph.front_ends.capture import Captured
from fxkfac.graph.program import Program
from fxkfac.graph.tapped import Run


@contextmanager
def _all_at_once(names: Iterable[str]) -> Iterator[None]:
    """Name what cannot be had where an op knows no data beside each other."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).split("\n")[0]
        if "vmap" not in said and "atching rule" not in said:
            raise
        raise UnsupportedUse(
            f"the exact blocks of {sorted(names)[:4]} take each datum's own gradient, of all data "
            f"at once, and an op of the model has no rule for that: {said} Expected ops that have "
            "one. Leave these parameters out: trace with structure='skip' for them."
        ) from error


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
        UnsupportedUse: An op has no rule for the gradients of all data at once.
    """
    signature = program.signature.with_constants(inputs)
    data, axes = [t.detach() for t in signature.tensors(inputs)], signature.axes
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
    per_datum = vmap(own_gradient, (None, 0, *axes), randomness="same")

    def check(vectors: Tensor, gradients: Mapping[str, Tensor]) -> None:
        last = [t if a is None else t.select(a, -1) for t, a in zip(data, axes, strict=True)]
        expected = own_gradient(chosen, vectors[-1], *last)
        _require_right_rules({n: g[-1] for n, g in gradients.items()}, expected, lowest)

    with _all_at_once(structures):
        alone = vmap(of_one, (None, *axes), randomness="same")(chosen, *data)
        if relative_error(alone, own) > tolerance_of_parts(own, lowest):
            raise BatchAxisError(f"a datum by itself gives another prediction {COUPLED}")
        for vector in vectors:
            sent, power = enlarged(vector, run.tapped.captured.underflows)
            sent = by_datum(run, sent)
            gradients = per_datum(chosen, sent, *data)
            key = ("all at once", tuple(structures), own.device, own.dtype)
            run.tapped.once(key, partial(check, sent, gradients))
            for name, kind in structures.items():
                G = reduced(gradients[name], power).to(total[name].dtype)
                total[name] = total[name] + _moment(G.reshape(len(G), -1), kind, total[name])
    return total


def _moment(G: Tensor, kind: str, like: Tensor) -> Tensor:
    """Of the gradients of all data, one in each row."""
    return G.mT @ G if kind == "dense" else G.square().sum(0).view_as(like)


def _require_right_rules(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], lowest: torch.dtype
) -> None:
    """Raise `UnsupportedUse` where gradients of all data at once are not a datum's own.

    A rule of `vmap` may be wrong without a word, as PyTorch 2.13's is for `cdist`.
    """
    errors = gradient_errors(found, expected, lowest)
    limits = {name: tolerance_of_parts(t, lowest) for name, t in expected.items()}
    if wrong := [f"{name} ({e:.1e})" for name, e in errors.items() if e > limits[name]]:
        raise UnsupportedUse(
            f"gradients of all data at once are not those of a datum by itself: relative errors "
            f"{', '.join(wrong[:4])}; an op of the model has a wrong rule for vmap, as cdist has. "
            "Write that op by others, or leave these parameters out: trace with structure='skip'."
        )


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
