"""Program, loss, one batch after the other -> factors whenever they are asked for."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from fxkfac.curvature.data import pair
from fxkfac.curvature.factor_pass import FactorPass
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.options import settings_of
from fxkfac.curvature.padding import Mask
from fxkfac.errors import DataError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.likelihoods.losses import likelihood_of


class Accumulation:
    """What `fxkfac.kfac` does with its data, in the hands of the caller: one batch at a time.

        accumulation = fxkfac.Accumulation(program, loss, fisher="mc")
        for inputs, targets in loader:
            accumulation.add(inputs, targets)
            fxkfac.save(accumulation, path)  # and fxkfac.resume(path, program, loss) goes on
        factors = accumulation.factors()

    Args:
        program, loss, params, fisher, mc_samples, sharing: As of `fxkfac.kfac`.
        separate_weight_and_bias, mask, generator, backend, memory: As of `fxkfac.kfac`.

    Attributes:
        over: The pass over the data that this is the face of.

    Raises:
        OptionError, LossError: As `fxkfac.kfac` does.
    """

    def __init__(
        self,
        program: Program,
        loss: Any,
        params: Params | None = None,
        fisher: str = "type-2",
        mc_samples: int = 1,
        sharing: str = "expand",
        separate_weight_and_bias: bool = False,
        mask: Mask | None = None,
        generator: Generator | None = None,
        backend: str = "eager",
        memory: int | None = None,
    ):
        likelihood = likelihood_of(loss)
        settings = settings_of(
            program, loss, fisher, sharing, mc_samples, separate_weight_and_bias, mask is not None
        )
        source = program.generator if generator is None else generator
        self.over = FactorPass(program, likelihood, settings, params, mask, source, backend, memory)

    @property
    def n(self) -> int:
        """Number of data that were added."""
        return 0 if self.over.total is None else self.over.total.n

    @property
    def batches(self) -> int:
        """Number of batches that were added."""
        return self.over.batches

    @full_precision()
    def add(self, inputs: Any, targets: Tensor) -> None:
        """Add one batch. One that fails adds nothing and draws nothing, so that it may come again.

        Args:
            inputs: As the program's example was.
            targets: As the loss takes them.

        Raises:
            DataError, LossError, NonFiniteError: As `fxkfac.kfac` does.
            MergeError: The model uses its parameters in another way for inputs of this shape.
            FxkfacError: An interruption has hit the very moment in which sums change.
        """
        self.over.add(*pair((inputs, targets)))

    @full_precision()
    def factors(self) -> Factors:
        """The factors of all that was added; a copy, so that more may be added.

        Raises:
            DataError: Nothing was added, or no target counts.
            FxkfacError: As `add` does.
        """
        self.over.require_whole()
        total = self.over.total
        if total is None:
            raise DataError("nothing was added yet; expected at least one batch.")
        over = self.over
        over.likelihood.reduction_factor(total.count)
        return over.of(total.copy())

    def __repr__(self) -> str:
        settings = self.over.settings
        how = f"{settings.fisher}, {settings.sharing}, {settings.loss}"
        return f"Accumulation({self.n} data in {self.batches} batches; {how})"
