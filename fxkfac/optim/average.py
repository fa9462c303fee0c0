"""Factors of one batch after the other -> their exponential moving average.

    average_t = Σ_s d^(t-s) factors_s / Σ_s d^(t-s)        with the decay d, over all batches so far

The weights sum to one from the first batch on, so that nothing is pulled towards a start at zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxkfac.curvature.factors import Factors, Product
from fxkfac.curvature.plan import require_same_terms


def next_average(average: Factors, latest: Factors, decay: float, updates: int) -> Factors:
    """The average after one more batch; its counts are those of the latest one.

    Args:
        average: That of all batches before.
        latest: The factors of the next batch, which are not changed.
        decay: d, at least zero and less than one.
        updates: Number of batches, with this one.

    Raises:
        MergeError: The batches went through graphs that use the parameters in other ways.
    """
    require_same_terms(average.plans.values(), latest.plans.values())
    # average_t = average_(t-1) + w (factors_t - average_(t-1)) with w = (1 - d) / (1 - d^t)
    weight = (1 - decay) / (1 - decay**updates)
    shared: dict[tuple[int, int], Tensor] = {}  # equal inputs have one A, and go on having one

    def between(mine: Product, new: Product) -> Product:
        key = id(mine.A), id(new.A)
        if key not in shared:
            shared[key] = torch.lerp(mine.A, new.A, weight)
        return Product(shared[key], torch.lerp(mine.B, new.B, weight), new.rows)

    return replace(
        latest,
        products={
            name: tuple(map(between, average.products[name], products))
            for name, products in latest.products.items()
        },
        exact={n: torch.lerp(average.exact[n], block, weight) for n, block in latest.exact.items()},
    )
