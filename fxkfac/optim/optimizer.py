"""Program, loss, data -> one step after the other: KFAC as a `torch.optim.Optimizer`.

    v = (C + λ I)⁻¹ g        m ← μ m + ν v        θ ← (1 − lr · weight_decay) θ − lr m

with the gradient g and the curvature C of one pass, and ν at most one, so that the step is not too
long. Parameters without curvature take a step of Adam.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxkfac.curvature.data import batches
from fxkfac.curvature.step import step as pass_over
from fxkfac.errors import NonFiniteError
from fxkfac.graph.program import Program
from fxkfac.isolation import own_randomness, seed_from
from fxkfac.optim.adam import move_by_adam, named
from fxkfac.optim.basis import require_squares
from fxkfac.optim.gradients import (
    Batches,
    Evaluation,
    loss_and_gradients,
    modes_with_buffers,
    move_buffers,
    unused,
)
from fxkfac.optim.groups import grouped, require_held, require_same_groups, require_same_loss
from fxkfac.optim.layout import held
from fxkfac.optim.policies import clipped, kl_factor, next_damping, predicted_change
from fxkfac.optim.preconditioner import Preconditioner
from fxkfac.optim.saved import refuse_to_copy
from fxkfac.ranges import require, require_count, require_fraction, require_keys, require_positive


class KFAC(Optimizer):
    """Steps along the natural gradient.

        optimizer = fxkfac.optim.KFAC(program, nn.CrossEntropyLoss(), lr=0.1)
        for x, y in loader:
            loss = optimizer.step(x, y)

    A step reads no `.grad` and writes none. A parameter that no batch of a step uses stays as it
    is. In train mode, buffers such as the averages of batch norm follow the data by one more
    forward pass, as they would in any training; a module that writes into none of its buffers in
    its first one has no other.

    Every group of `param_groups` is either of `method` "kfac" or of `method` "adam", with its own
    `lr`, which schedulers of `torch.optim.lr_scheduler` set.

    Args:
        program: What `fxkfac.trace` returned. Its selected parameters are what is trained.
        loss: As of `fxkfac.kfac`.
        lr: Learning rate of parameters with curvature.
        momentum: μ of these.
        weight_decay: Of all parameters.
        decoupled: Weight decay shrinks parameters by lr · weight_decay (Loshchilov & Hutter 2019),
            rather than being added to gradients.
        adam_lr, betas, eps: Of parameters without curvature: skipped ones, those from which another
            weight is computed, biases that have joined such a weight, and those whose structure is
            "identity".
        groups: Options for some of the parameters: dicts with names or patterns as "params", and
            any of the options above.
        max_norm: Clips the norm of all gradients together, before anything else.
        kl_clip: κ: natural gradients are scaled down until Σ lr² vᵀg is at most κ.
        lm_interval: Adapt the damping at every so many steps by how well the quadratic model, with
            the exact GGN, has foretold the loss (Martens & Grosse 2015, Section 6.5, without
            damping in that model); for losses with a convex likelihood. Default: never.
        preconditioner: Options of `fxkfac.optim.Preconditioner`.

    Raises:
        OptionError: An argument is out of its range, or a parameter is in two groups.
        UnknownParameter: A name or pattern matches no parameter.
        LossError: The loss has no likelihood here.
    """

    def __init__(
        self,
        program: Program,
        loss: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        adam_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        groups: Sequence[Mapping[str, Any]] = (),
        max_norm: float | None = None,
        kl_clip: float | None = None,
        lm_interval: int | None = None,
        **preconditioner: Any,
    ):
        for name, value in (("max_norm", max_norm), ("kl_clip", kl_clip)):
            if value is not None:
                require_positive(name, value)
        if lm_interval is not None:
            require_count("lm_interval", lm_interval, "whole number of steps")
        self.program, self.loss = program, loss
        self.max_norm, self.kl_clip, self.lm_interval = max_norm, kl_clip, lm_interval
        self.preconditioner = Preconditioner(program, loss, **preconditioner)
        self._buffers_stay: set[tuple[bool, ...]] = set()  # modes in which a run writes into none
        self._foretells = lm_interval is None  # or whether the quadratic model was tried
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "adam_lr": adam_lr,
            "betas": betas,
            "eps": eps,
        }
        covered = set(self.preconditioner.covered)
        own = grouped(program.model, held(program), covered, groups, defaults)
        # Schedulers know by this default what to cycle.
        super().__init__(own, {"momentum": require_fraction("momentum", momentum)})
        self._frozen = {name for name, θ in self._trained() if not θ.requires_grad}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that the program knows nothing of, with `OptionError`."""
        require(
            "method" in param_group,
            "a group was added to the optimizer; expected those it was made with, of what was "
            "traced. Trace the model and make an optimizer anew, and say its options by `groups`.",
        )
        super().add_param_group(param_group)

    def step(self, inputs: Any, targets: Any = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            inputs: The inputs of one batch; without `targets`, an iterable of (inputs, targets),
                whose loss is that of all of them together.
            targets: Its targets.

        Returns:
            The loss before the step.

        Raises:
            DataError, NonFiniteError: As of `fxkfac.step`, and where `ekfac=True` would average the
                square of a gradient that overflows; nothing has changed then but what random
                numbers were drawn.
            ParameterError: The model holds other parameters than when this was made, or one of them
                was frozen since.
            MergeError: The loss is another one, or has other options, than when this was made.
            UnsupportedUse: With `lm_interval`, PyTorch cannot differentiate the backward pass of
                an op of the model; no parameter has changed then.
        """
        require_held(self._trained(), held(self.program), self._frozen)
        require_same_loss(self.loss, self.preconditioner.settings)
        data = list(batches(inputs if targets is None else (inputs, targets)))
        p = self.preconditioner
        drawn = p.generator.get_state()
        loss, gradients = self._pass_over(data)
        self._follow_with_buffers(data)
        adapts = self.lm_interval is not None and p.steps % self.lm_interval == 0
        before = self._values() if adapts else {}
        self._move(gradients, unused(self.program, data))
        if adapts:
            self._adapt(data, drawn, loss, gradients, before)
        return loss

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [pair for group in self.param_groups for pair in named(group)]

    def _values(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in held(self.program).items()}

    def _pass_over(self, data: Batches) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients, and the curvature if it is due."""
        p = self.preconditioner
        if p.is_due:
            step = pass_over(self.program, self.loss, data, **p.options)
            factors = step.factors
            found = Evaluation(step.loss, step.gradients, factors.reduction)
        else:
            wanted, factors = self.program.asked.selected, None
            found = loss_and_gradients(self.program, p.likelihood, data, p.generator, wanted)
        if p.ekfac:
            require_squares(found.gradients, p.covered, found.reduction)
        self._try_to_foretell(data, found.gradients)
        p.advance(factors)
        p.reduction = found.reduction
        return found.loss, found.gradients

    def _try_to_foretell(self, data: Batches, g: Mapping[str, Tensor]) -> None:
        """Where the model has no quadratic one, say so before anything has moved: once."""
        if not self._foretells:
            predicted_change(self.program.model, self.loss, data, held(self.program), g, g)
            self._foretells = True

    def _follow_with_buffers(self, data: Batches) -> None:
        model = self.program.model
        modes = modes_with_buffers(model)
        if not any(modes) or modes in self._buffers_stay:
            return
        # No draw from the generator: what a resumed run finds out anew must not change it.
        if not move_buffers(model, [x for x, _ in data], seed=self.preconditioner.steps):
            self._buffers_stay.add(modes)

    @torch.no_grad()
    def _move(self, of_batch: dict[str, Tensor], skipped: Collection[str]) -> None:
        gradients = clipped(of_batch, self.max_norm)
        rest = [_without(group, skipped) for group in self.param_groups]
        groups = [group for group in rest if group["params"]]
        for group in groups:
            if not group["decoupled"] and group["weight_decay"]:
                for name, θ in named(group):
                    gradients[name] = gradients[name] + group["weight_decay"] * θ
        kfac = [group for group in groups if group["method"] == "kfac"]
        covered = {name: gradients[name] for name in self.preconditioner.covered}
        natural = self.preconditioner.solve(covered, of_batch)
        lengths = [(g["lr"], natural[n], gradients[n]) for g in kfac for n, _ in named(g)]
        ν = kl_factor(lengths, self.kl_clip)
        for group in groups:
            if group["method"] == "kfac":
                self._move_by_kfac(group, natural, ν)
            else:
                move_by_adam(group, gradients, self.state)

    def _move_by_kfac(
        self, group: dict[str, Any], natural: Mapping[str, Tensor], ν: float | Tensor
    ) -> None:
        lr, μ, θs = group["lr"], group["momentum"], group["params"]
        steps = [natural[name] for name in group["param_names"]]
        if self.kl_clip is not None:
            steps = list(torch._foreach_mul(steps, ν))
        if group["decoupled"] and group["weight_decay"]:
            torch._foreach_mul_(θs, 1 - lr * group["weight_decay"])
        if μ:
            last = [_last(self.state[θ], θ) for θ in θs]
            steps = list(torch._foreach_add(steps, last, alpha=μ))
            for θ, step in zip(θs, steps, strict=True):
                self.state[θ]["momentum"] = step
        torch._foreach_sub_(θs, steps, alpha=lr)

    def _adapt(
        self,
        data: Batches,
        drawn: Tensor,
        loss: Tensor,
        gradients: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
    ) -> None:
        """Compare the loss with what was foretold, on the same data.

        Of one batch, all three are under the same dropout.
        """
        p, model = self.preconditioner, self.program.model
        again = torch.Generator(p.generator.device)
        again.set_state(drawn)
        try:
            after = loss_and_gradients(self.program, p.likelihood, data, again, ()).loss
        except NonFiniteError:  # as bad as a step can be, and the next one says so
            after = torch.full_like(loss, inf)
        now = held(self.program)
        step = {name: now[name].detach() - before[name] for name in gradients}
        again.set_state(drawn)
        with own_randomness(seed_from(again)):
            predicted = predicted_change(model, self.loss, data, before, gradients, step)
        assert self.lm_interval is not None
        p.damping = next_damping(p.damping, float(after - loss), predicted, self.lm_interval)

    def __getstate__(self) -> NoReturn:
        refuse_to_copy("an optimizer")

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, and the preconditioner's; tensors and numbers alone."""
        return {**super().state_dict(), "preconditioner": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: with parameters as they were, bit for bit.

        Raises:
            OptionError: The state has other groups, or blocks, or tensors of other shapes.
        """
        require_keys(state_dict, ("state", "param_groups", "preconditioner"))
        own = {key: state_dict[key] for key in ("state", "param_groups")}
        require_same_groups(own["param_groups"], self.param_groups)
        self.preconditioner.load_state_dict(state_dict["preconditioner"])
        super().load_state_dict(deepcopy(own))  # it would share tensors with the other optimizer


def _without(group: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    kept = [(name, θ) for name, θ in named(group) if name not in names]
    return {**group, "param_names": [name for name, _ in kept], "params": [θ for _, θ in kept]}


def _last(state: Mapping[str, Tensor], θ: Tensor) -> Tensor:
    return state["momentum"] if "momentum" in state else torch.zeros_like(θ)
