"""One batch of data -> the rows of every datum's own gradient, term by term.

One backward pass of the summed loss gives the gradients at all taps. As data do not depend on each
other, what arrives at a datum's rows is of its own loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.datum import Heard, require_independent, rows_of
from fxkfac.curvature.diagonal import positions_in_datum
from fxkfac.curvature.perdatum import datum_gradients
from fxkfac.curvature.plan import TermPlan
from fxkfac.curvature.schedule import Schedule, schedule_of
from fxkfac.curvature.settings import Settings
from fxkfac.curvature.together import enlarged, reduced
from fxkfac.errors import BatchAxisError, DataError, NonFiniteError, UnsupportedUse
from fxkfac.graph.program import Program
from fxkfac.graph.tap import Taps
from fxkfac.graph.tapped import Run, Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.normal import Input, detached
from fxkfac.isolation import is_finite, not_finite, own_randomness
from fxkfac.likelihoods.backpropagation import sites_of
from fxkfac.likelihoods.base import Likelihood
from fxkfac.linalg.rows import Formed, Rows
from fxkfac.precision import accurate_dtype


@dataclass(frozen=True)
class Reader:
    """What makes rows of a batch: always the same for one call."""

    program: Program
    likelihood: Likelihood
    settings: Settings
    state: Mapping[str, Tensor]

    def read(self, inputs: Any, targets: Any, where: str) -> Batch:
        """Run one batch forward and back.

        Raises:
            DataError: Inputs and targets do not fit.
            NonFiniteError: NaN or Inf in the gradients.
            BatchAxisError: It is not known whose row a row is, or data are coupled.
            UnsupportedUse: A block is of a parameter that has no taps.
        """
        ran = self._forward(inputs, targets, where)
        return ran.sent_back(ran.vector)

    def read_sites(self, inputs: Any, targets: Any, where: str) -> Iterator[Batch]:
        """Run one batch forward, and back from one site of every datum after the other.

        Raises:
            DataError, NonFiniteError, BatchAxisError, UnsupportedUse: As `read` does.
        """
        ran = self._forward(inputs, targets, where)
        datum = positions_in_datum(ran.run)
        site, sites = sites_of(self.likelihood, ran.run.prediction.detach(), datum)
        for s in sites:
            yield ran.sent_back(torch.where(site == s, ran.vector, 0))

    def _forward(self, inputs: Any, targets: Any, where: str) -> _Ran:
        try:
            tapped, tensors = self.program.at(inputs, self.state)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        schedule = schedule_of(
            self.program, tapped, self.settings.structures, self.settings.separate_weight_and_bias
        )
        schedule.require_factors()
        _require_apart(tapped)
        _require_tapped(schedule, self.settings)
        taps = Taps()
        with own_randomness(0):  # so that dropout drops the same at every reading
            run = self.program.run_graph(tapped, tensors, self.state, taps)
        prediction = run.prediction.detach()
        self.likelihood.validate(prediction, targets)
        vector = self.likelihood.scale * self.likelihood.gradient(prediction, targets)
        if not is_finite(vector):
            raise NonFiniteError(
                f"{where}: the loss's gradient in the prediction holds NaN or Inf; expected finite "
                "numbers. Look at the parameters, or at the data of this batch."
            )
        return _Ran(schedule, run, taps, vector, where)


@dataclass(frozen=True)
class _Ran:
    """One batch that has run forward, and the gradient of the summed loss in its prediction."""

    schedule: Schedule
    run: Run
    taps: Taps
    vector: Tensor
    where: str

    def sent_back(self, vector: Tensor) -> Batch:
        gradients = self._gradients(vector)
        if not_finite({str(place): g for place, g in gradients.items()}) is not None:
            raise NonFiniteError(
                f"{self.where}: a gradient holds NaN or Inf; expected finite numbers. Look for an "
                "op without a slope at these data, as sqrt at zero."
            )
        return Batch(self.schedule, self.run.n, self._inputs, gradients)

    def _gradients(self, vector: Tensor) -> dict[int, Tensor]:
        vector, power = enlarged(vector, self.run.tapped.captured.underflows)
        found = self.taps.gradients(self.run.prediction, vector)
        return {place: reduced(g, power) for place, g in found.items()}

    @cached_property
    def _inputs(self) -> dict[Use, Input]:
        uses = self.schedule.tapped.uses
        return {uses[k]: detached(x) for k, x in self.taps.inputs.items()}


@dataclass(frozen=True)
class Batch:
    """The taps of one batch.

    Attributes:
        n: Number of data.
        inputs: The input of every use.
        gradients: The gradient of the summed loss, or of its terms at one site, at every tap.
    """

    schedule: Schedule
    n: int
    inputs: Mapping[Use, Input]
    gradients: Mapping[int, Tensor]

    @cached_property
    def blocks(self) -> dict[str, tuple[TermPlan, ...]]:
        """The terms of every block that has any."""
        return {block.name: block.terms for block in self.schedule.blocks}

    def term(self, term: TermPlan) -> Rows:
        """The rows of one term."""
        heard = [
            Heard(use, term.scales[k], self.inputs[use], self._gradient(use).unsqueeze(0), None)
            for k, use in enumerate(term.uses)
        ]
        (rows,) = rows_of(term, heard, self.n, 1, accurate_dtype(heard[0].g), tokens=True)
        return rows

    def exact(self, name: str) -> Formed | None:
        """The gradients of a parameter with an exact block; `None` where nothing uses it."""
        if name not in self.schedule.exact:
            return None
        uses = self.schedule.exact[name]
        parts = datum_gradients(name, uses, self.inputs.__getitem__, self._gradient)
        return Formed(torch.cat(list(parts)).view(1, self.n, -1, 1, 1))

    def _gradient(self, use: Use) -> Tensor:
        return self.gradients[use.tap]


def _require_apart(tapped: Tapped) -> None:
    """Raise `BatchAxisError` unless every row is known to be one datum's."""
    require_independent(tapped)
    for use in tapped.uses:
        if use.batch is None:
            at = f" ({use.source})" if use.source else ""
            raise BatchAxisError(
                f"{', '.join(use.parameters)} enters {use.op}{at}, and no one axis of its output "
                f"{use.y_shape} holds the data in their order, so that it is not known whose "
                "gradient a row is of; expected (outer · N · inner) on one axis. Leave it out: "
                "trace with structure='skip' for it."
            )


def _require_tapped(schedule: Schedule, settings: Settings) -> None:
    """Raise `UnsupportedUse` for blocks whose gradients do not come from taps."""
    same = [name for name, kind in settings.structures.items() if kind == "identity"]
    if lost := [*schedule.from_graph, *same]:
        raise UnsupportedUse(
            f"{', '.join(lost[:4])}: no tap holds the gradients of these parameters, which have "
            "no normal form or the identity as their block; expected Kronecker factors or an exact "
            "block from taps. Leave them out: trace with structure='skip' for them."
        )
