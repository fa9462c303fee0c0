"""Program, loss, one batch after the other -> averaged factors, their bases, natural gradients.

Each of the three has its own rhythm: factors every `factor_interval` steps, decompositions every
`inverse_interval` steps, a solve whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.factors import Factors, require_factors
from fxkfac.curvature.kfac import kfac
from fxkfac.curvature.padding import Mask
from fxkfac.curvature.plan import BlockPlan
from fxkfac.curvature.running import RunningAverage
from fxkfac.errors import FxkfacError
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.optim import saved
from fxkfac.optim.basis import Basis, Inverses, basis_of, eigh_once, require_squares
from fxkfac.optim.layout import (
    Layout,
    are_same,
    held,
    layouts,
    plans_of,
    require_all,
    require_blocks,
)
from fxkfac.parameters import canonical_names
from fxkfac.ranges import require, require_count, require_flag, require_keys, require_positive

DAMP = ("split", "block")


class Preconditioner:
    """Natural gradients by running averages of Kronecker factors, for an optimizer of any kind.

        preconditioner = fxkfac.optim.Preconditioner(program, nn.CrossEntropyLoss())
        loss(model(x), y).backward()
        preconditioner.update(x, y)
        preconditioner.precondition()  # every .grad with curvature is a natural gradient now
        sgd.step()

    Args:
        program: What `fxkfac.trace` returned.
        loss: As of `fxkfac.kfac`.
        damping: λ, added to the curvature; also an attribute that may be set at any time.
        damp: `"split"`: √λ is split between both factors of a product by the ratio π of their
            sizes (Martens & Grosse 2015, Section 6.3). `"block"`: λ is added to every eigenvalue of
            the product itself, as by `Factors.solve`. Exact blocks are damped as by `"block"`.
        ekfac: Replace the eigenvalues of products by second moments of the gradient in their
            eigenbasis (George et al. 2018), kept as a running average of the squares of mini-batch
            gradients, each over its R. They begin as the eigenvalues, and when a basis changes,
            what they say is carried over. Needs `damp="block"`.
        decay: Of the running averages of A, B, exact blocks and second moments; their bias is
            corrected. With zero the last batch alone counts.
        factor_interval: Factors are computed at every so many calls of `update`.
        inverse_interval: They are decomposed at every so many.
        fisher, mc_samples, sharing, separate_weight_and_bias, mask, backend, memory: As of
            `fxkfac.step`.
        generator: Source of random labels and dropout; its state is part of `state_dict`. Default:
            one of its own, which begins at PyTorch's seed.

    Attributes:
        reduction: R of the batch that gradients are of, for `ekfac`: updates with factors set it.
            Set it before `solve` after one without, if that batch counts otherwise.

    Raises:
        OptionError: An argument is out of its range.
        LossError: The loss has no likelihood here.
    """

    def __init__(
        self,
        program: Program,
        loss: Any,
        damping: float = 1e-3,
        damp: str = "split",
        ekfac: bool = False,
        decay: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 10,
        fisher: str = "mc",
        mc_samples: int = 1,
        sharing: str = "expand",
        separate_weight_and_bias: bool = False,
        mask: Mask | None = None,
        generator: Generator | None = None,
        backend: str = "eager",
        memory: int | None = None,
    ):
        require(damp in DAMP, f"damp={damp!r}; expected 'split' or 'block'.")
        ekfac = require_flag("ekfac", ekfac)
        require(not ekfac or damp == "block", "ekfac=True has no two factors; pass damp='block'.")
        require_count("factor_interval", factor_interval, "whole number of steps")
        require_count("inverse_interval", inverse_interval, "whole number of steps")
        self.program, self.loss = program, loss
        self.damping, self.split, self.ekfac, self.decay = damping, damp == "split", ekfac, decay
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        own = Generator().manual_seed(torch.initial_seed() % 2**63)
        self.generator = own if generator is None else generator
        self.options: dict[str, Any] = {
            "fisher": fisher,
            "mc_samples": mc_samples,
            "sharing": sharing,
            "separate_weight_and_bias": separate_weight_and_bias,
            "mask": mask,
            "generator": self.generator,
            "backend": backend,
            "memory": memory,
        }
        over = Accumulation(program, loss, **self.options).over  # refuses what is out of range
        self.likelihood, self.settings = over.likelihood, over.settings
        self.steps = 0
        self.average = RunningAverage(decay)
        self.reduction = 1.0
        self.bases: dict[str, Basis] = {}
        self._inverses: dict[str, tuple[Basis, float, Inverses]] = {}  # of which basis and damping
        self._layouts = self._laid_out(plans_of(program, self.settings)[0])

    def _laid_out(self, plans: Mapping[str, BlockPlan]) -> dict[str, Layout]:
        return layouts(plans, self.settings, self.program.asked.selected, self.split)

    @property
    def damping(self) -> float:
        """λ, which may be set at any time. Raises `OptionError` unless it is positive."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping = require_positive("damping", value)

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the parameters with curvature; the others' gradients stay as they are."""
        return tuple(name for layout in self._layouts.values() for name in layout.params)

    @property
    def is_due(self) -> bool:
        """Whether the next update computes factors."""
        return bool(self._layouts) and self.steps % self.factor_interval == 0

    def update(self, inputs: Any, targets: Any = None) -> None:
        """Take in the curvature of one more batch, if factors are due.

        Args:
            inputs: The inputs of one batch; without `targets`, an iterable of (inputs, targets).
            targets: Its targets.

        Raises:
            DataError, NonFiniteError, MergeError: As `fxkfac.kfac` and sums of factors do.
        """
        data = inputs if targets is None else (inputs, targets)
        found = kfac(self.program, self.loss, data, **self.options) if self.is_due else None
        self.advance(found)

    @full_precision()
    def advance(self, factors: Factors | None) -> None:
        """Count one step, whose factors are these if they were due; decompose if that is due.

        Raises:
            MergeError: These data use other parameters than those before, or not all of them; or
                the factors have other blocks than those of the program with these options.
        """
        if factors is not None:
            require_factors(factors)
            require_blocks(factors.settings, self.settings)
            found = self._layouts
            if self.average.averages is None:
                trace, *_ = plans_of(self.program, self.settings)
                if not are_same(factors.plans, trace):
                    found = self._laid_out(factors.plans)  # other shapes may use other entries
                    require_all(found, self._layouts)
            self.average.update(factors)
            self._layouts = found
            self.reduction = factors.reduction
        if self.steps % self.inverse_interval == 0:
            self._decompose()
        self.steps += 1

    def _decompose(self) -> None:
        decompose = eigh_once()
        for name, layout in self._layouts.items():
            basis = basis_of(self.average[name], layout.kind, self.damping, self.split, decompose)
            if self.ekfac and layout.kind == "product" and name in self.bases:
                basis = basis.carried(self.bases[name])
            self.bases[name] = basis

    @full_precision()
    def solve(
        self, gradients: dict[str, Tensor], of_batch: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The natural gradients, for gradients by name; without curvature they stay as they are.

        Args:
            gradients: What is divided by the curvature.
            of_batch: With `ekfac=True`, the gradients of the last batch, which enter the second
                moments first: where `gradients` are clipped, say. Default: `gradients`.

        Raises:
            UnknownParameter: A parameter of one of the blocks has a gradient and another one none,
                or no parameter is called so.
            OptionError: A gradient is sparse, is none, or comes under two names of one parameter.
            ParameterError: A gradient has another shape than its parameter, or is not floating.
            NonFiniteError: With `ekfac=True`, the square of a gradient overflows.
            FxkfacError: There was no update yet.
        """
        if self.steps == 0:
            raise FxkfacError("there are no factors yet; call `update(inputs, targets)` first.")
        given, first = self._by_name(gradients), of_batch and self._by_name(of_batch)
        if self.ekfac:
            require_squares(first or given, self.covered, self.reduction)
        natural = dict(given)
        for name, layout in self._layouts.items():
            if not set(layout.params) & set(given):
                continue
            basis = self.bases[name]
            G = layout.matrix(given, basis.inputs.dtype)
            if self.ekfac and layout.kind == "product":
                own = layout.matrix(first, G.dtype) if first else G
                basis = self.bases[name] = basis.observe(own, self.reduction, self.decay)
            solved = layout.parameters(self._solved(name, basis, G), given, self.damping)
            natural |= {n: part.to(given[n].dtype) for n, part in solved.items()}
        return dict(zip(gradients, natural.values(), strict=True))

    def _by_name(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same in the same order, by the names by which the blocks know their parameters."""
        known = canonical_names(gradients, self.program.model.resolve)
        return {known[name]: g for name, g in gradients.items()}

    def _solved(self, name: str, basis: Basis, G: Tensor) -> Tensor:
        if not basis.split:
            return basis.solve(G, self.damping)
        held = self._inverses.get(name)
        if held is None or held[0] is not basis or held[1] != self.damping:
            held = self._inverses[name] = basis, self.damping, basis.inverses(self.damping)
        return held[2].solve(G)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replace the values of all `.grad` of parameters with curvature by natural gradients.

        Raises:
            UnknownParameter, OptionError, NonFiniteError, FxkfacError: As `solve` does.
        """
        tensors = held(self.program)
        gradients = {n: t.grad for n, t in tensors.items() if t.grad is not None}
        for name, natural in self.solve(gradients).items():
            if natural is not gradients[name]:
                gradients[name].copy_(natural)

    def __getstate__(self) -> NoReturn:
        saved.refuse_to_copy("a preconditioner")

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as tensors and numbers: averages, bases, damping, generator."""
        return {
            "steps": self.steps,
            "damping": self.damping,
            "generator": self.generator.get_state(),
            "reduction": self.reduction,
            "average": saved.of_average(self.average),
            "bases": {name: saved.of_basis(basis) for name, basis in self.bases.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, bit for bit.

        Raises:
            OptionError: The state has other blocks, or other entries in them, or tensors of other
                shapes, or is one with another `damp` or `ekfac`.
        """
        require_keys(state, ("steps", "damping", "generator", "reduction", "average", "bases"))
        plans = saved.plans_like(state["average"], plans_of(self.program, self.settings))
        own = self._laid_out(plans)
        saved.require_same_blocks(state["bases"], own)
        device = self.program.like.device
        bases = {name: saved.to_basis(kept, device) for name, kept in state["bases"].items()}
        for name, basis in bases.items():
            saved.require_fit(name, basis, own[name], self.split, self.ekfac)
        saved.require_same_entries(state["average"], plans)
        self.steps, self.damping = state["steps"], state["damping"]
        self.generator.set_state(state["generator"].cpu())
        self.reduction = state["reduction"]
        self.average = saved.to_average(
            state["average"], self.program, self.settings, plans, self.likelihood, self.decay
        )
        self.bases, self._layouts = bases, own
