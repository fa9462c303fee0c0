"""Likelihoods whose labels are a function of prediction and noise.

So noise may be drawn before there is a prediction, of which `validate` looks at shape and dtype
alone: a batch, forwards and backwards, can be one piece of compiled code.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from fxkfac.likelihoods.base import Likelihood
from fxkfac.precision import accurate_dtype


class ClosedForm(Likelihood):
    """One of those."""

    @abstractmethod
    def noise(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """What labels are drawn by, for a prediction of this shape, dtype and device."""

    @abstractmethod
    def label(self, f: Tensor, noise: Tensor) -> Tensor:
        """The label that noise draws from r(· | f)."""

    def room(self, f: Tensor) -> Tensor:
        """Memory for the noise: a number for every one of f, in no half precision."""
        return torch.empty(f.shape, dtype=accurate_dtype(f), device=f.device)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """ỹ ~ r(· | f). Section 2.3."""
        return self.label(f.detach(), self.noise(f, generator))

    def copied(self) -> Self:
        """The same likelihood, with tensors of its own."""
        same = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(same, name, value.detach().clone())
        return same

    def given(self, noise: Tensor) -> Likelihood:
        """The same likelihood, whose labels are drawn by this noise."""
        same = copy.copy(self)
        same.noise = lambda f, generator: noise  # type: ignore[method-assign]
        return same
