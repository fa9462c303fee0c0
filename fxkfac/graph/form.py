"""The normal form: every linear op is one einsum in which each axis of the weight is of one kind.

    y[g, rows, o] = Σ_i W[g, i, o] · x[g, rows, i]

`Form` says how a concrete op is that einsum; nothing downstream of it knows which op it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch.fx import Node

from fxkfac.graph.axes import axis_lengths, axis_tokens, letters, renamed
from fxkfac.graph.uses.viewed import Reader


class BatchAxis(NamedTuple):
    """Where the data are: the row axis `axis` is laid out as (outer, batch, inner)."""

    axis: str
    outer: int
    inner: int

    def __str__(self) -> str:
        parts = [str(self.outer)] * (self.outer > 1) + ["N"] + [str(self.inner)] * (self.inner > 1)
        return "·".join(parts)


ONLY = BatchAxis("", 1, 1)  # of an op without axes of rows: its one row is the only datum's


@dataclass(frozen=True)
class Patches:
    """The input is the patches of a convolution, one axis per kernel dimension at the end."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Folded:
    """The output is folded from patches, as a transposed convolution does.

    Attributes:
        patches: How a gradient at the output is taken as patches.
        places: Spatial sizes of the input, one patch each.
    """

    patches: Patches
    places: tuple[int, ...]


@dataclass(frozen=True)
class OneHot:
    """The input is a tensor of indices that stands for its one-hot encoding.

    The index `ignored`, if any, stands for the zero vector.
    """

    size: int
    ignored: int | None = None


@dataclass(frozen=True)
class Routes:
    """Every row takes the weight of one group, whose number an index says, or of none.

    Attributes:
        index: The node of the numbers; for rows that are sorted by group, of each group's end; or
            where there is but one weight, whether a row is real and takes it.
        axes: The row axes of the numbers, as an einops axis list.
        axis: The group axis, which only the weight has; empty where there is but one weight.
        size: Number of groups.
        ends: Whether the index holds the groups' ends.
    """

    index: Node
    axes: str
    axis: str
    size: int
    ends: bool = False


@dataclass(frozen=True)
class Form:
    """One linear op as one einsum over named axes.

    Attributes:
        weight: einops axis list of the weight operand. `(g o)` is one axis of the tensor that holds
            two axes of the einsum; `1` is an axis of length one.
        x: That of the prepared input; empty where the input is the constant one.
        y: That of the output.
        input: The node of the input, `None` where it is the constant one.
        prepare: What happens to the input before the axis list `x` holds.
        folded: What happens to a gradient at the output before the axis list `y` holds.
        sizes: Lengths of axes inside brackets that the shapes do not tell.
        scale: The op computes `scale` times the einsum.
        apart: Axes in W and y that count as group axes, although x does not have them.
        routes: Which group's weight a row takes, where it takes one alone.
        reader: What remembers how tensors of an axis list are read.
    """

    weight: str
    x: str
    y: str
    input: Node | None = None
    prepare: Patches | OneHot | None = None
    folded: Folded | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    scale: float = 1.0
    apart: tuple[str, ...] = ()
    routes: Routes | None = None
    reader: Reader = field(default_factory=Reader, init=False, repr=False, compare=False)
    # What was made before: the same for every vector and every batch.
    _patterns: dict[tuple[str, BatchAxis | None], str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _row_sizes: dict[tuple[str, BatchAxis | None], Mapping[str, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def group(self) -> list[str]:
        """Axes in W, x and y; those that are taken apart, and the one that is chosen from."""
        chosen = letters(self.routes.axis) if self.routes else []
        inside = [*letters(self.x), *self.apart, *chosen]
        return [a for a in letters(self.weight) if a in inside and a in [*letters(self.y), *chosen]]

    @cached_property
    def d_in(self) -> list[str]:
        """Axes in W and x only: summed over."""
        return [
            a for a in letters(self.weight) if a in letters(self.x) and a not in letters(self.y)
        ]

    @cached_property
    def d_out(self) -> list[str]:
        """Axes in W and y only."""
        return [
            a
            for a in letters(self.weight)
            if a in letters(self.y) and a not in [*letters(self.x), *self.apart]
        ]

    @cached_property
    def rows(self) -> list[str]:
        """Axes of y that are not in W: batch and shared axes together."""
        return [a for a in letters(self.y) if a not in letters(self.weight)]

    @property
    def normal_weight(self) -> str:
        """The einops pattern that brings the weight operand into (group, in, out)."""
        return f"{self.weight} -> {_normal(self.group, [_join(self.d_in)], self.d_out)}"

    def normal_x(self, batch: BatchAxis | None = None) -> str:
        """The einops pattern that brings x into (group, rows.., in) or (group, batch, shared, in).

        Row axes that x does not have come out with length one, and so does that of an op which has
        none, as a vector's product. Axes of x alone are summed.
        """
        return self._normal_rows(self.x, self.d_in, batch)

    def normal_routes(self, batch: BatchAxis | None = None) -> str:
        """The same for the numbers of the groups: (1, rows.., 1) or (1, batch, shared, 1)."""
        assert self.routes is not None
        return self._normal_rows(self.routes.axes, [], batch)

    def spread(self, axes: str, batch: BatchAxis) -> list[str]:
        """Shared axes that a tensor lacks while it has others: it repeats itself along them.

        The axis of the data is one of them where it holds several rows of each datum.
        """
        shared = [a for a in self.rows if a != batch.axis or batch.outer * batch.inner > 1]
        lacking = [a for a in shared if a not in letters(axes)]
        return lacking if len(lacking) < len(shared) else []

    def normal_y(self, batch: BatchAxis | None = None) -> str:
        """The same for y: (group, rows.., out) or (group, batch, shared, out)."""
        return self._normal_rows(self.y, self.d_out, batch)

    def _normal_rows(self, axes: str, d: list[str], at: BatchAxis | None) -> str:
        if (axes, at) not in self._patterns:
            self._patterns[axes, at] = self._pattern(axes, d, at)
        return self._patterns[axes, at]

    def _pattern(self, axes: str, d: list[str], at: BatchAxis | None) -> str:
        own = letters(axes)
        present = [a for a in self.rows if a in own]
        group = [a for a in self.group if a in own]
        if at is None:
            middle = [a if a in present else "1" for a in self.rows] or ["1"]  # one row by itself
            return f"{axes} -> {_normal(group, middle, d)}"
        split = {at.axis: f"{at.axis}_outer {at.axis}_batch {at.axis}_inner"}
        shared = " ".join(_shared(at) if a == at.axis else a for a in self.rows if a in present)
        batch = f"{at.axis}_batch" if at.axis in present else "1"
        return f"{renamed(axes, split)} -> {_normal(group, [batch, f'({shared})'], d)}"

    def row_sizes(self, axes: str, batch: BatchAxis | None) -> Mapping[str, int]:
        """Lengths that `normal_x` and `normal_y` need beside the shapes."""
        if (axes, batch) not in self._row_sizes:
            self._row_sizes[axes, batch] = self._sizes_of_rows(axes, batch)
        return self._row_sizes[axes, batch]

    def _sizes_of_rows(self, axes: str, batch: BatchAxis | None) -> dict[str, int]:
        sizes = {a: n for a, n in self.sizes.items() if a in letters(axes)}
        if batch is None or batch.axis not in letters(axes):
            return sizes
        split = {f"{batch.axis}_outer": batch.outer, f"{batch.axis}_inner": batch.inner}
        return sizes | split

    def row_lengths(self, shape: Sequence[int]) -> list[int]:
        """Lengths of the row axes of an output of this shape, in the order of `rows`, or one."""
        if self.folded is not None:
            patches, places = self.folded.patches, self.folded.places
            shape = (*shape[: len(shape) - len(places)], *places, *patches.kernel)
        lengths = axis_lengths(self.y, shape, self.sizes)
        return [lengths[a] for a in self.rows] or [1]

    def shared_lengths(self, shape: Sequence[int], batch: BatchAxis) -> list[int]:
        """Lengths of the shared axes of an output of this shape, in order; none of length one."""
        every: list[int] = []
        for axis, length in zip(self.rows, self.row_lengths(shape), strict=False):
            every += [batch.outer, batch.inner] if axis == batch.axis else [length]
        return [length for length in every if length > 1]

    @property
    def is_elementwise(self) -> bool:
        """Whether every entry of the weight is multiplied by one number: a scale."""
        return bool(self.x or self.input) and not self.d_in and not self.d_out

    def orientation(self) -> str:
        """A short name for the printed table, such as `o i` or `g i o`."""
        kinds = dict.fromkeys(self.d_in, "i") | dict.fromkeys(self.d_out, "o")
        kinds |= {a: "g" for a in self.group if self.sizes.get(a) != 1}
        tokens = [[kinds[a] for a in letters(t) if a in kinds] for t in axis_tokens(self.weight)]
        named = [list(dict.fromkeys(token)) for token in tokens if token]
        return " ".join(k[0] if len(k) == 1 else f"({' '.join(k)})" for k in named) or "·"

    @property
    def row_position(self) -> dict[str, int]:
        """For every row axis, which axis of the output it is in."""
        return {a: k for k, token in enumerate(axis_tokens(self.y)) for a in letters(token)}


def _join(axes: Iterable[str]) -> str:
    return f"({' '.join(axes)})"


def _normal(group: list[str], middle: list[str], last: list[str]) -> str:
    return " ".join([_join(group), *middle, _join(last)])


def _shared(batch: BatchAxis) -> str:
    return f"{batch.axis}_outer {batch.axis}_inner"
