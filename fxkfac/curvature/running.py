"""Factors of one batch after the other -> their running averages, of A and of B by themselves.

    m_t = β m_{t−1} + (1 − β) X_t,    mean_t = m_t / (1 − β^t)

with m_0 = 0, as Adam averages gradients: the correction takes out that the sum began at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxkfac.curvature.curvature import AnyBlock, Curvature
from fxkfac.curvature.factors import Factors, Product, require_factors, require_same_computation
from fxkfac.errors import FxkfacError, OptionError
from fxkfac.functional import unknown
from fxkfac.precision import accurate_dtype
from fxkfac.ranges import require_fraction

PARTS = ("AB", "A", "B")


class RunningAverage(Curvature):
    """Exponential moving averages of factors: a mapping from the name of a weight to its block.

    Blocks hold the averages themselves, in float32 or better, with their bias corrected; `update`
    changes these in place, so copy what should stay.

        average = fxkfac.RunningAverage(0.95)
        average.update(fxkfac.step(program, loss, batch).factors)
        average.solve(gradients, damping=1e-3)

    A group of a weight that no row of a batch has chosen says nothing of its B, which stays.

    Args:
        decay: β of A; and of B and of exact blocks, unless `decay_B` says another one.
        decay_B: β of B and of exact blocks, which are made of gradients, too.

    Raises:
        OptionError: A decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.95, decay_B: float | None = None):
        self.decay = require_fraction("decay", decay)
        self.decay_B = self.decay if decay_B is None else require_fraction("decay_B", decay_B)
        self._held: Factors | None = None
        self._updates_A = self._updates_exact = 0
        self._updates_B: list[int | Tensor] = []  # of every product; (group,) with `Product.rows`

    def __repr__(self) -> str:
        of = f"{len(self)} blocks, update {self._updates_A} of A" if self._held else "nothing yet"
        return f"RunningAverage({of}; decay={self.decay}, decay_B={self.decay_B})"

    @torch.no_grad()
    def update(self, factors: Factors, parts: str = "AB") -> None:
        """Take in the factors of one batch.

        Args:
            factors: As of `fxkfac.kfac`, or `fxkfac.step(..).factors`.
            parts: `"AB"`, or `"A"` or `"B"` alone; exact blocks go with B. The first update needs
                both.

        Raises:
            OptionError: There are no such parts, the first update is not of both, or these are no
                factors, or those of no data.
            MergeError: The factors are of other parameters, or of other entries or orientations of
                them, or were computed with other settings.
            NoDataError: No target of theirs counts, so that A has no R.
        """
        require_factors(factors)
        if parts not in PARTS:
            raise OptionError(f"parts={parts!r}; expected 'AB', 'A' or 'B'.")
        if not factors.n:
            raise OptionError("the factors are of no data; expected those of a batch. Skip them.")
        factors.likelihood.reduction_factor(factors.count)
        if self._held is None:
            if parts != "AB":
                raise OptionError(f"parts={parts!r} in the first update; expected 'AB'.")
            self._held = _zeros(factors)
            self._updates_B = [0] * len(_products(factors))
        require_same_computation(self._held, factors)
        if "A" in parts:
            self._update_inputs(factors)
        if "B" in parts:
            self._update_gradients(factors)

    def _update_inputs(self, factors: Factors) -> None:
        self._part_where_they_part(factors)
        self._updates_A += 1
        weight = _weight(self.decay, self._updates_A)
        pairs = zip(_products(self._factors), _products(factors), strict=True)
        for mine, theirs in {id(p.A): (p.A, q.A) for p, q in pairs}.values():
            mine.lerp_(theirs.to(mine), weight)

    def _part_where_they_part(self, factors: Factors) -> None:
        """Equal inputs have one A, but not where the targets of a batch say what is padding."""
        theirs: dict[int, set[int]] = {}
        for p, q in zip(_products(self._factors), _products(factors), strict=True):
            theirs.setdefault(id(p.A), set()).add(id(q.A))
        if any(len(different) > 1 for different in theirs.values()):
            self._held = _with(self._factors, lambda p: replace(p, A=p.A.clone()))

    def _update_gradients(self, factors: Factors) -> None:
        pairs = zip(_products(self._factors), _products(factors), strict=True)
        for k, (mine, theirs) in enumerate(pairs):
            seen = theirs.rows > 0
            self._updates_B[k] = number = self._updates_B[k] + seen
            if isinstance(number, Tensor):
                weights = _weights(seen, self.decay_B, number)
                mine.B.lerp_(theirs.B.to(mine.B), weights.to(mine.B))
            elif seen:
                mine.B.lerp_(theirs.B.to(mine.B), _weight(self.decay_B, number))
        self._updates_exact += 1
        for name, block in self._factors.exact.items():
            weight = _weight(self.decay_B, self._updates_exact)
            block.lerp_(factors.exact[name].to(block), weight)

    # --- to go on later ---

    @property
    def updates(self) -> dict[str, Any]:
        """How many updates there were: of A, of every product's B, and of exact blocks."""
        counts = {"A": self._updates_A, "B": list(self._updates_B), "exact": self._updates_exact}
        return counts if self._held is not None else {}

    @property
    def averages(self) -> Factors | None:
        """The averages in the place of factors, if there are any; the counts are the first ones."""
        return self._held

    def restore(self, averages: Factors, updates: Mapping[str, Any]) -> None:
        """Go on from averages, which `update` will change in place, after so many updates."""
        self._held = averages
        self._updates_A, self._updates_exact = updates["A"], updates["exact"]
        self._updates_B = list(updates["B"])

    # --- as a curvature ---

    @property
    def _factors(self) -> Factors:
        if self._held is None:
            raise FxkfacError("there is nothing to average yet; call `update(factors)` first.")
        return self._held

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that have a block, and their shapes."""
        return self._factors.shapes

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of all."""
        return self._factors.like

    def canonical(self, name: str) -> str:
        """The name of a tied parameter that the blocks know it by."""
        return self._factors.canonical(name)

    def __getitem__(self, name: str) -> AnyBlock:
        if self._held is None:
            raise unknown(name, ())
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(()) if self._held is None else iter(self._held)

    def __len__(self) -> int:
        return 0 if self._held is None else len(self._held)


def _weight(decay: float, number: Any) -> Any:
    """Of the last one of so many: mean_t = mean_{t−1} + weight · (X_t − mean_{t−1})."""
    return (1 - decay) / (1 - decay**number)


def _weights(seen: bool | Tensor, decay: float, number: Tensor) -> Tensor:
    """The same for every group, (group, 1, 1); zero where none was seen."""
    here = torch.as_tensor(seen, device=number.device)
    return torch.where(here, _weight(decay, number.double()), 0.0).view(-1, 1, 1)


def _products(factors: Factors) -> list[Product]:
    return [product for products in factors.products.values() for product in products]


def _with(factors: Factors, change: Callable[[Product], Product]) -> Factors:
    products = {name: tuple(map(change, ps)) for name, ps in factors.products.items()}
    return replace(factors, products=products)


def _zeros(factors: Factors) -> Factors:
    """Room for averages, with one A for equal inputs."""
    made: dict[int, Tensor] = {}

    def room(p: Product) -> Product:
        return Product(made.setdefault(id(p.A), _zeros_like(p.A)), _zeros_like(p.B), p.rows)

    held = _with(factors, room)
    exact = {name: _zeros_like(e) for name, e in factors.exact.items()}
    return replace(held, exact=exact, point=None)  # the mean of several


def _zeros_like(t: Tensor) -> Tensor:
    return torch.zeros_like(t, dtype=accurate_dtype(t))
