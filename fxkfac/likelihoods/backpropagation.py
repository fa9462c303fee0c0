"""What is sent back from the prediction: (Fisher flavour, likelihood, f, y) -> ▲_1, ▲_2, ...

Every flavour is C = R Σ_n J_nᵀ (Σ_c ▲_{n,c} ▲_{n,c}ᵀ) J_n; they differ in the ▲ alone (paper,
Equation 2 and Section 4.3). One yielded tensor holds ▲_c of *all* data at once, and carries no R.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxkfac.errors import LossError, OptionError
from fxkfac.isolation import generator_on
from fxkfac.likelihoods.base import Likelihood, hessian_root
from fxkfac.ranges import require_count


def backpropagated_vectors(
    fisher: str,
    likelihood: Likelihood,
    prediction: Tensor,
    target: Any,
    datum: Tensor | None,
    mc_samples: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The vectors ▲ of one flavour, each in the prediction's shape, without R. Section 4.3.

    Args:
        fisher: One of `FISHERS`.
        likelihood: Whose criterion is differentiated.
        prediction: f, of all data, the data along whatever axis.
        target: y, as the likelihood takes it.
        datum: int64, in the prediction's shape: the position 0..dim F - 1 of every element within
            its own datum. For a prediction [N, C] it is `arange(C)`, broadcast. `None` for the
            flavours that are not in `BY_POSITION`.
        mc_samples: M, the number of vectors of 'mc' and 'curvature-propagation'.
        generator: Where labels and signs are drawn from.

    Raises:
        OptionError: An unknown flavour, or M < 1.
        LossError: The likelihood lacks what the flavour needs (sampling, labels, convexity).
    """
    require_fisher(fisher)
    require_count("mc_samples", mc_samples)
    assert datum is None or datum.shape == prediction.shape
    f = prediction.detach()
    return _VECTORS[fisher](_Backpropagation(likelihood, f, target, datum, mc_samples, generator))


# Flavours whose vectors are non-zero at one position of each datum: they must know which is whose.
BY_POSITION = frozenset({"type-2", "type-1"})
SAMPLED = frozenset({"mc", "curvature-propagation"})  # those with M vectors


def require_fisher(fisher: str) -> None:
    """Raise `OptionError` with the choices and the nearest one unless `fisher` is a flavour."""
    if fisher not in FISHERS:
        near = difflib.get_close_matches(str(fisher), FISHERS, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        choices = ", ".join(map(repr, FISHERS))
        raise OptionError(f"no fisher is called {fisher!r}. {hint}Choose one of {choices}.")


def has_several(fisher: str, mc_samples: int) -> bool:
    """Whether a flavour has more than one vector."""
    return fisher in BY_POSITION or (fisher in SAMPLED and mc_samples > 1)


def sends_back(fisher: str) -> bool:
    """Whether a flavour has any vector."""
    return fisher != "forward-only"


@dataclass(frozen=True)
class _Backpropagation:
    likelihood: Likelihood
    f: Tensor
    y: Any
    datum: Tensor | None
    mc_samples: int
    generator: torch.Generator

    def fitting(self, vector: Tensor) -> Tensor:
        """What a formula of the likelihood gave. Raises `LossError` unless it is like `f`."""
        if vector.shape != self.f.shape:
            raise LossError(
                f"a formula of {type(self.likelihood).__name__} gave a vector of shape "
                f"{tuple(vector.shape)}; expected that of the prediction, {tuple(self.f.shape)}. "
                "Look at its `gradient`, `hessian_sqrt` and `hessian_columns`."
            )
        return vector


def _type2(at: _Backpropagation) -> Iterator[Tensor]:
    site, sites = _sites(at)
    for column in map(at.fitting, at.likelihood.hessian_columns(at.f, at.y)):
        # Sites are independent, so that one column serves each of them, and all data.
        yield from _at_each(column, site, sites)


def _mc(at: _Backpropagation) -> Iterator[Tensor]:
    for _ in range(at.mc_samples):
        sampled = at.likelihood.sample(at.f, at.generator)
        # ▲ = ∇_f c(f, ỹ) / √M, Definition 20
        gradient = at.fitting(at.likelihood.sampled_gradient(at.f, at.y, sampled))
        yield gradient if at.mc_samples == 1 else gradient / math.sqrt(at.mc_samples)


def _type1(at: _Backpropagation) -> Iterator[Tensor]:
    site, sites = _sites(at)
    for probability, label in at.likelihood.labels(at.f):
        # ▲ = √p(y) ∇_f c(f, y). Sites are independent and their would-be gradients have mean
        # zero, so that the expectation has no terms between two sites: one vector for each.
        gradient = at.fitting(at.likelihood.sampled_gradient(at.f, at.y, label))
        yield from _at_each((probability.sqrt() * gradient).to(at.f.dtype), site, sites)


def _curvature_propagation(at: _Backpropagation) -> Iterator[Tensor]:
    S = hessian_root(at.likelihood, at.f, at.y)
    g = generator_on(at.f.device, at.generator)
    for _ in range(at.mc_samples):
        signs = 2 * torch.randint(2, at.f.shape, generator=g, device=g.device).to(at.f) - 1
        yield at.fitting(S(signs)) / math.sqrt(at.mc_samples)  # ▲ = S ε / √M


def _empirical(at: _Backpropagation) -> Iterator[Tensor]:
    yield at.fitting(at.likelihood.gradient(at.f, at.y))  # ▲ = ∇_f c(f, y), Definition 21


def _forward_only(at: _Backpropagation) -> Iterator[Tensor]:
    return iter(())


def _sites(at: _Backpropagation) -> tuple[Tensor, list[int]]:
    assert at.datum is not None
    return sites_of(at.likelihood, at.f, at.datum)


def sites_of(likelihood: Likelihood, f: Tensor, datum: Tensor) -> tuple[Tensor, list[int]]:
    """Which site of its datum an element belongs to (broadcasts to f), and all of them, in order.

    Args:
        likelihood: Whose criterion is a sum over sites.
        f: The prediction.
        datum: As of `backpropagated_vectors`.
    """
    axes = likelihood.event_axes(f)
    # A site is known by the first of its elements.
    site = datum.amin(axes, keepdim=True) if axes else datum
    return site, site.unique().tolist()


def _at_each(vector: Tensor, site: Tensor, sites: list[int]) -> Iterator[Tensor]:
    """The same at one site of every datum after the other, and zero elsewhere."""
    for s in sites:
        yield torch.where(site == s, vector, 0) if len(sites) > 1 else vector


_VECTORS: dict[str, Callable[[_Backpropagation], Iterator[Tensor]]] = {
    "type-2": _type2,
    "mc": _mc,
    "type-1": _type1,
    "curvature-propagation": _curvature_propagation,
    "empirical": _empirical,
    "forward-only": _forward_only,
}
FISHERS = tuple(_VECTORS)
