"""The model as a function of its state and a flat list of tensors, as graphs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxkfac.functional import FunctionalModel, Inputs, prediction_of
from fxkfac.graph.deviation import Rounded, compared
from fxkfac.graph.signature import Signature

State = Mapping[str, Tensor]  # parameters and buffers by name


@dataclass(frozen=True)
class FlatModel:
    """The model itself as a function of its state and flat input tensors, as the graph is."""

    bound: FunctionalModel
    signature: Signature

    def state(self) -> State:
        """Parameters and buffers as they are now."""
        return {**self.bound.current(), **self.bound.buffers()}

    def predict(self, state: State, data: Sequence[Tensor]) -> Tensor:
        """The model's prediction, from the same random numbers each time."""
        with self.bound.holding(state) as model:
            return self._predict(model, data)

    def _predict(self, model: Callable[[Inputs], Any], data: Sequence[Tensor]) -> Tensor:
        torch.manual_seed(0)
        copies = [t.clone() for t in data]  # the model may write into its inputs
        with torch.enable_grad():  # and take gradients inside
            return prediction_of(model(self.signature.inputs(copies)))

    def gradients(
        self, state: State, data: Sequence[Tensor], cotangent: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Every named parameter's gradient of ⟨cotangent, prediction⟩, by autograd."""
        leaves = {n: state[n].detach().requires_grad_() for n in names}
        # A checkpoint runs parts of the model again: while it still holds these tensors.
        with self.bound.holding({**state, **leaves}) as model:
            prediction = self._predict(model, data)
            if not prediction.requires_grad or not leaves:
                return {n: torch.zeros_like(t) for n, t in leaves.items()}
            wanted = list(leaves.values())
            gradients = torch.autograd.grad(
                prediction, wanted, cotangent, allow_unused=True, materialize_grads=True
            )
        return dict(zip(leaves, gradients, strict=True))

    def gradient_errors(
        self,
        found: Mapping[str, Tensor],
        state: State,
        data: Sequence[Tensor],
        cotangent: Tensor,
        lowest: torch.dtype,
    ) -> tuple[dict[str, float], list[str]]:
        """Relative errors of gradients, and the names of those that are not the model's."""
        names = list(found)
        expected = self.gradients(state, data, cotangent, names)

        def rounded() -> dict[str, Tensor]:
            off = Rounded(lowest)
            moved = {name: off(t.detach()) for name, t in state.items()}
            return self.gradients(moved, [off(t) for t in data], cotangent, names)

        return compared(found, expected, lowest, rounded)
