"""One batch -> its factors: run the tapped graph, send vectors back, sum the products of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fxkfac.curvature.backpropagation import BY_POSITION, backpropagated_vectors
from fxkfac.curvature.diagonal import gradient_moments, positions_in_datum
from fxkfac.curvature.factors import Factors, Settings, Sums
from fxkfac.curvature.likelihoods import Likelihood
from fxkfac.curvature.padding import Mask, Padding, ignored_positions, padding_of
from fxkfac.curvature.perdatum import exact_moment, exact_names, zero_moment
from fxkfac.curvature.plan import BlockPlan, plan_blocks
from fxkfac.curvature.sharing import (
    Counted,
    Kept,
    chosen_groups,
    input_moment,
    output_moment,
    rows_kept,
)
from fxkfac.errors import DataError, NonFiniteError
from fxkfac.functional import Params
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Input, Routed, detached
from fxkfac.graph.program import Program, Run
from fxkfac.graph.structure import EXACT
from fxkfac.isolation import own_randomness


@dataclass(frozen=True)
class Batch:
    """One batch: what ran, and what is sent back from its prediction.

    Attributes:
        inputs: The tapped input of every use.
        groups: For uses whose rows choose a group, which one every row has chosen.
    """

    program: Program
    run: Run
    inputs: Mapping[Use, Input]
    groups: Mapping[Use, Tensor]
    settings: Settings
    likelihood: Likelihood
    targets: Tensor
    generator: Generator
    padding: Padding

    def vectors(self) -> Iterator[Tensor]:
        """The backpropagated vectors ▲, of the prediction's shape."""
        return backpropagated_vectors(
            self.settings.fisher,
            self.likelihood,
            self.run.prediction.detach(),
            self.targets,
            positions_in_datum(self.run) if self.settings.fisher in BY_POSITION else None,
            self.settings.mc_samples,
            self.generator,
        )

    def input(self, use: Use) -> Input:
        """The tapped input of a use."""
        return detached(self.inputs[use])

    def kept(self, use: Use) -> Kept:
        """Which rows of a use belong to which group, and are no padding."""
        return rows_kept(self.padding.real(use, self.output(use)), self.groups.get(use))

    def output(self, use: Use) -> Tensor:
        """The tapped output of a use."""
        return self.run.taps[use.tap].detach()


def batch_factors(
    program: Program,
    likelihood: Likelihood,
    settings: Settings,
    data: tuple[Any, Tensor, Mask | None],
    params: Params | None,
    generator: Generator,
    number: int,
) -> Factors:
    """The factors of one batch."""
    inputs, targets, mask = data
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with own_randomness(seed):  # dropout draws from the global state, which is the caller's
        run = _run(program, inputs, params, number)
        prediction = run.prediction.detach()
        if not torch.isfinite(prediction).all():
            raise NonFiniteError(
                f"the prediction for batch {number} holds NaN or Inf; expected finite numbers. "
                "Look at the parameters, or at the data of this batch."
            )
        likelihood.validate(prediction, targets)
        tapped = dict(zip(run.tapped.uses, run.inputs, strict=True))
        padding = (
            ignored_positions(likelihood, run, targets)
            if mask is None
            else padding_of(mask, inputs, targets, run)
        )
        groups = {
            u: chosen_groups(u, x, run.taps[u.tap])
            for u, x in tapped.items()
            if isinstance(x, Routed)
        }
        batch = Batch(
            program, run, tapped, groups, settings, likelihood, targets, generator, padding
        )
        apart = frozenset(n for n, kind in settings.structures.items() if kind != "kronecker")
        plans = plan_blocks(run.tapped.uses, settings.separate_weight_and_bias, apart)
        from_taps, from_graph = exact_names(program, run.tapped, settings.structures)
        terms, exact = _sums(batch, plans, from_taps)
        sums = {plan.name: s for plan, s in zip(plans, terms, strict=True)}
        exact |= _without_taps(batch, inputs, params, from_graph)
        for name, kind in settings.structures.items():
            if kind in EXACT and name not in exact:  # nothing uses it
                exact[name] = zero_moment(program.model.tensors[name], kind)
    _require_finite(sums, exact, number)
    return Factors(
        settings=settings,
        n=run.n,
        count=float(likelihood.count(prediction, targets)),
        model=program.model,
        likelihood=likelihood,
        plans={plan.name: plan for plan in plans},
        sums=sums,
        exact=exact,
    )


def _run(program: Program, inputs: Any, params: Params | None, number: int) -> Run:
    try:
        return program.run(inputs, params)
    except DataError as error:
        raise DataError(f"batch {number}: {error}") from None


def _sums(
    batch: Batch, plans: Sequence[BlockPlan], names: Sequence[str]
) -> tuple[list[tuple[Sums, ...]], dict[str, Tensor]]:
    """Raw sums of every term of every block, and of the exact blocks of `names`."""
    terms = [term for plan in plans for term in plan.terms]
    sharing = batch.settings.sharing

    def output_moments(gradients: Sequence[Tensor]) -> list[Tensor]:
        return [
            output_moment(t, sharing, lambda use: gradients[use.tap], batch.kept) for t in terms
        ]

    total: list[Tensor] = []
    exact: dict[str, Tensor] = {}
    for gradients in _gradients(batch):
        for use in batch.run.tapped.uses:
            batch.padding.look(use, gradients[use.tap])
        for name, moment in _exact_moments(batch, names, gradients).items():
            exact[name] = exact[name] + moment if name in exact else moment
        parts = output_moments(gradients)
        total = [t + p for t, p in zip(total, parts, strict=True)] if total else parts
    if not total:  # forward-only: nothing is sent back
        total = output_moments([torch.zeros_like(y) for y in batch.run.taps])
    # Last, since what is padding may only be known when all gradients have been seen.
    moments = [input_moment(t, sharing, batch.input, batch.output, batch.kept) for t in terms]
    rest = iter(Sums(a, b, rows) for (a, rows), b in zip(moments, total, strict=True))
    return [tuple(next(rest) for _ in plan.terms) for plan in plans], exact


def _exact_moments(
    batch: Batch, names: Sequence[str], gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """For one vector, the products of every datum's gradient of the parameters in `names`."""
    kinds, shapes = batch.settings.structures, batch.settings.parameters
    uses = {n: [u for u in batch.run.tapped.uses if n in u.parameters] for n in names}
    return {
        n: exact_moment(n, kinds[n], shapes[n], uses[n], batch.input, lambda u: gradients[u.tap])
        for n in names
    }


def _gradients(batch: Batch) -> Iterator[tuple[Tensor, ...]]:
    """For each backpropagated vector, its gradients at all taps."""
    run = batch.run
    for vector in batch.vectors() if run.taps else ():
        yield torch.autograd.grad(
            run.prediction,
            run.taps,
            vector,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def _without_taps(
    batch: Batch, inputs: Any, params: Params | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """Exact blocks of parameters that have no normal form."""
    if not names:
        return {}
    program = batch.program
    state = {**program.model.override(params), **program.model.buffers()}
    kinds = {name: batch.settings.structures[name] for name in names}
    return gradient_moments(program, batch.run, state, inputs, kinds, batch.vectors())


def _require_finite(
    sums: Mapping[str, Iterable[Sums]], exact: Mapping[str, Tensor], number: int
) -> None:
    for name, block in exact.items():
        _require_finite_factor("the exact block", name, block, number)
    for name, terms in sums.items():
        for term in terms:
            a = term.a.diagonal if isinstance(term.a, Counted) else term.a.diagonal(dim1=1, dim2=2)
            # A NaN or Inf in any row shows on the diagonal, since that sums squares.
            for factor, diagonal in (("A", a), ("B", term.b.diagonal(dim1=1, dim2=2))):
                _require_finite_factor(f"factor {factor}", name, diagonal, number)


def _require_finite_factor(what: str, name: str, numbers: Tensor, number: int) -> None:
    if not torch.isfinite(numbers).all():
        raise NonFiniteError(
            f"{what} of {name!r} holds NaN or Inf after batch {number}; expected finite numbers. "
            "Compute in a wider dtype, or look at this layer."
        )
