"""Program, loss, data -> loss and gradients, where no curvature is due; and what else a step needs.

That is what has no gradient at all, and buffers that have moved with the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fxkfac.curvature.batch import require_finite_prediction
from fxkfac.curvature.slope import Slope, SlopeSums, batch_slope
from fxkfac.curvature.together import gradients_of
from fxkfac.functional import FunctionalModel, copied, split_inputs
from fxkfac.graph.program import Program
from fxkfac.graph.uses.normal import Input
from fxkfac.isolation import full_precision, in_place_of, own_randomness, seed_from
from fxkfac.likelihoods.base import Likelihood, count_of

Batches = Sequence[tuple[Any, Any]]


class _Deaf:
    """A sink that wants nothing, so that the tapped graph is the model."""

    def output(self, place: int, y: Tensor) -> Tensor:
        """The output as it is."""
        return y

    def input(self, use: int, x: Input, y: Tensor) -> None:
        """Let it go."""


class Evaluation(NamedTuple):
    """The loss of all data, its gradients, and R of these data."""

    loss: Tensor
    gradients: dict[str, Tensor]
    reduction: float


@full_precision()
def loss_and_gradients(
    program: Program,
    likelihood: Likelihood,
    data: Batches,
    generator: Generator,
    wanted: Sequence[str],
) -> Evaluation:
    """The loss of all data with its reduction, and its gradients in the parameters `wanted`.

    From the same state of the generator, dropout is that of `fxkfac.step` as long as that has
    drawn no label: in the first batch.

    Raises:
        DataError, NonFiniteError: As `fxkfac.step` does.
    """
    state = program.state()
    sums = SlopeSums(next(iter(state.values())).new_zeros(()))
    count = 0.0
    for number, (inputs, targets) in enumerate(data):
        tapped, tensors = program.at(inputs, state)
        leaves = {name: state[name].detach().requires_grad_() for name in wanted}
        with own_randomness(seed_from(generator)):
            run = program.run_graph(tapped, tensors, {**state, **leaves}, _Deaf())
        f = run.prediction.detach()
        require_finite_prediction(f, number)
        likelihood.validate(f, targets)
        count += count_of(likelihood, f, targets)
        if leaves:
            to_leaves = partial(gradients_of, run.prediction, list(leaves.values()))
            underflows = tapped.captured.underflows
            sums.add(leaves, batch_slope(likelihood, f, targets, to_leaves, underflows))
        else:
            sums.add((), Slope(likelihood.criterion(f, targets), ()))
    R = likelihood.reduction_factor(count)
    gradients = sums.reduced(R, {name: state[name] for name in wanted})
    return Evaluation(R * sums.criterion, gradients, R)


def unused(program: Program, data: Batches) -> set[str]:
    """Names of the selected parameters on which no batch's prediction depends."""
    trained = set(program.asked.selected)
    if all(tapped.captured.used >= trained for tapped in program.graphs):
        return set()
    return trained.difference(*(program.at(x)[0].captured.used for x, _ in data))


def modes_with_buffers(model: FunctionalModel) -> tuple[bool, ...]:
    """Which modules with buffers are in train mode; none of a function."""
    module = model.model
    if not isinstance(module, nn.Module):
        return ()
    with_buffers = [m for m in module.modules() if next(m.buffers(recurse=False), None) is not None]
    return tuple(m.training for m in with_buffers)


@torch.no_grad()
def move_buffers(model: FunctionalModel, inputs: Iterable[Any], seed: int) -> bool:
    """Run the user's module itself, as training would; whether it has written into a buffer.

    What it has written may be what was there, such as a maximum that no datum has exceeded yet.
    """
    module = model.model
    assert isinstance(module, nn.Module)
    before = {name: (b, _version(b), b.clone()) for name, b in model.buffers().items()}
    with own_randomness(seed), model.autocast.again(), in_place_of(_replaced(model), module):
        for one in inputs:
            args, kwargs = split_inputs(copied(one))
            module(*args, **kwargs)
        after = [(m, dict(m._buffers)) for m in module.modules()]
    for m, buffers in after:  # also those that were assigned
        m._buffers.update(buffers)
    return any(
        name not in before or _is_written(b, *before[name]) for name, b in model.buffers().items()
    )


def _replaced(model: FunctionalModel) -> dict[int, Tensor]:
    """The tensors in the place of the module's own parameters, by these ones' `id`."""
    own = model.model.named_parameters(remove_duplicate=False)  # type: ignore[union-attr]
    names = [(model.aliases.get(name, name), p) for name, p in own]
    return {id(p): model.tensors[name] for name, p in names if name in model.replaced}


def _is_written(now: Tensor, held: Tensor, version: int, values: Tensor) -> bool:
    """By its version, or by its values: not every kernel counts versions."""
    return now is not held or _version(now) != version or not values.equal(now)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # which has none
