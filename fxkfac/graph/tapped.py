"""One tapped graph, what is known of it, and a batch that has run through it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import GraphModule

from fxkfac.graph.experiments.locate import Layout
from fxkfac.graph.front_ends.capture import Captured
from fxkfac.graph.overloads import may_draw
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.match import Unsupported

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Tapped:
    """One tapped graph.

    Attributes:
        captured: The graph as it was captured.
        module: The same with taps: (sink, parameters, buffers, inputs) -> prediction.
        uses: The uses of all covered parameters.
        unsupported: What has no normal form.
        prediction: Batch axis of the prediction as (axis, outer, inner), `None` if not found.
        dynamic: Whether the graph runs at other batch sizes.
        verified: Batch sizes at which the prediction was compared with the model's.
        refusals: Front ends that were tried before, and why they did not do.
        coupled: Whether one datum's prediction depends on the others'.
        alike: Whether that is not known, since the data of the example are alike.
        by_values: Whether values of the data say where each datum is; see `located_again`.
        derived: For every weight that is computed from parameters, its node and shape.
        memo: What others have made of this graph, which lives as long as it does.
    """

    captured: Captured
    module: GraphModule
    uses: tuple[Use, ...]
    unsupported: tuple[Unsupported, ...]
    prediction: Layout | None
    dynamic: bool
    verified: set[int] = field(repr=False)
    refusals: Mapping[str, str] = field(default_factory=dict)
    coupled: bool = False
    alike: bool = False
    by_values: bool = False
    derived: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the parameters with a use that has no normal form."""
        return tuple(dict.fromkeys(p for u in self.unsupported for p in u.parameters))

    @property
    def may_draw(self) -> bool:
        """Whether it may draw random numbers, as dropout does in training."""
        return self.once("may draw", lambda: may_draw(self.captured.module.graph))

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made of this graph before, under this key; else it is made now."""
        if key not in self.memo:
            self.memo[key] = make()
        found: Made = self.memo[key]
        return found


@dataclass(frozen=True)
class Run:
    """One batch of data.

    Attributes:
        tapped: The graph that ran.
        prediction: The model's output.
        n: Number of data.
    """

    tapped: Tapped
    prediction: Tensor
    n: int
