"""Loss, gradients and factors of the same data, from one forward pass: what an optimizer needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from fxkfac.curvature.accumulated import Accumulated
from fxkfac.curvature.backends import Differentiable
from fxkfac.curvature.data import Data, batches
from fxkfac.curvature.factor_pass import FactorPass
from fxkfac.curvature.factors import Factors, scale_of
from fxkfac.curvature.options import settings_of
from fxkfac.curvature.padding import Mask
from fxkfac.curvature.slope import SlopeSums
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.likelihoods.losses import likelihood_of


@dataclass(frozen=True)
class Step:
    """What an optimizer needs of some data.

    Attributes:
        loss: The loss, a scalar.
        gradients: Its gradient in every parameter that was selected when tracing, by name.
        factors: The curvature, as of `fxkfac.kfac`.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    factors: Factors


@full_precision()
def step(
    program: Program,
    loss: Any,
    data: Data,
    params: Params | None = None,
    fisher: str = "mc",
    mc_samples: int = 1,
    sharing: str = "expand",
    separate_weight_and_bias: bool = False,
    mask: Mask | None = None,
    generator: Generator | None = None,
    backend: str = "eager",
    memory: int | None = None,
) -> Step:
    """Loss, gradients and factors from one forward pass over each batch.

    Nothing is written into the parameters' `.grad`. With dropout, all three are of one draw.

    Args:
        program: What `fxkfac.trace` returned.
        loss, data, params, fisher, mc_samples, sharing: As of `fxkfac.kfac`.
        separate_weight_and_bias, mask, generator, backend, memory: As of `fxkfac.kfac`.

    Returns:
        The loss of all data with its reduction, its gradients, and the factors.

    Raises:
        OptionError, LossError, DataError, NonFiniteError: As `fxkfac.kfac` does; and where a
            gradient holds NaN or Inf.
    """
    settings = settings_of(
        program, loss, fisher, sharing, mc_samples, separate_weight_and_bias, mask is not None
    )
    likelihood = likelihood_of(loss)
    source = program.generator if generator is None else generator
    over = _Steps(program, likelihood, settings, params, mask, source, backend, memory)
    return over.part(over.run(batches(data)))


@dataclass
class _Steps(FactorPass):
    """A pass that also sums criterion and gradients."""

    slopes: SlopeSums = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted = tuple(self.program.asked.selected)
        self.slopes = SlopeSums(next(iter(self.state.values())).new_zeros(()))

    def mark(self) -> None:
        """No point is kept, for the parameters move on right away."""

    def of(self, total: Accumulated) -> Factors:
        """Without their point."""
        return total.factors(self.settings, self.program.model, self.likelihood)

    def part(self, factors: Factors) -> Step:
        """Loss and gradients, too."""
        R = scale_of(self.likelihood, factors.count)
        gradients = self.slopes.reduced(R, {name: self.state[name] for name in self.wanted})
        return Step(R * self.slopes.criterion, gradients, factors)

    def _send_back(self, ran: Differentiable, vectors: Iterable[Tensor]) -> None:
        super()._send_back(ran, vectors)
        self.slopes.add(self.wanted, ran.slope())
