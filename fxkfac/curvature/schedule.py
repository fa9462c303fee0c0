"""Tapped graph and settings -> which sums each tap goes into."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fxkfac.curvature.images import Images, input_images, output_images
from fxkfac.curvature.plan import BlockPlan, TermPlan, plan_blocks
from fxkfac.errors import UnsupportedUse
from fxkfac.graph.axes import axis_lengths
from fxkfac.graph.program import Program
from fxkfac.graph.structure import EXACT
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.graph.uses.match import Unsupported
from fxkfac.graph.uses.normal import normal_weight


@dataclass(frozen=True, eq=False)
class Schedule:
    """What happens with the taps of one graph.

    Attributes:
        tapped: The graph.
        blocks: The blocks with Kronecker factors.
        terms: All terms of these.
        same_input: For every term, the first one that has the same A.
        places: For every use of a term's weight, the terms and its position in each.
        at_tap: The uses of every tap of which something is summed.
        exact: Parameters whose exact blocks come from the taps, and their uses.
        exact_of: For every use of these, the parameters.
        from_graph: Parameters whose exact blocks come from the graph.
        lost: Parameters that have factors in the graph of the trace, and a use without normal form
            in this one.
    """

    tapped: Tapped
    blocks: tuple[BlockPlan, ...]
    terms: tuple[TermPlan, ...]
    same_input: tuple[int, ...]
    places: Mapping[Use, tuple[tuple[int, int], ...]]
    at_tap: Mapping[int, tuple[Use, ...]]
    exact: Mapping[str, tuple[Use, ...]]
    exact_of: Mapping[Use, tuple[str, ...]]
    from_graph: tuple[str, ...]
    lost: Mapping[str, Unsupported]

    def require_factors(self) -> None:
        """Raise `UnsupportedUse` where this graph cannot have the factors that the trace's has."""
        if self.lost:
            name, use = next(iter(self.lost.items()))
            raise UnsupportedUse(
                f"{use}\n{name!r} has factors in the graph of the inputs that were traced, and can "
                "have none in that of these; expected factors in both. Trace with inputs like "
                f"these, or with structure={{{name!r}: 'diagonal'}}, which is exact for all."
            )

    @cached_property
    def inputs(self) -> Mapping[Use, Images | None]:
        """Where inputs are images."""
        return {use: input_images(use) for use in self.heard}

    @cached_property
    def outputs(self) -> Mapping[Use, Images | None]:
        """Where gradients at outputs are."""
        return {use: output_images(use) for use in self.heard}

    @cached_property
    def widest(self) -> int:
        """The largest number of rows of a factor."""
        return max((max(s) for t in self.terms for s in self._sizes(t)), default=0)

    def _sizes(self, term: TermPlan) -> Iterator[tuple[int, int]]:
        if not term.is_bias:
            for place, use in enumerate(term.uses):
                _, d_in, d_out = normal_weight(use).shape
                yield (0 if term.counts_only else d_in + len(term.scales[place])), d_out

    @cached_property
    def heard(self) -> frozenset[Use]:
        """The uses of which something is summed."""
        return frozenset(use for uses in self.at_tap.values() for use in uses)


def schedule_of(
    program: Program,
    tapped: Tapped,
    structures: Mapping[str, str],
    separate_weight_and_bias: bool,
) -> Schedule:
    """Plan the blocks of a graph, and find where each of its taps goes; once for all batches."""
    key = ("schedule", tuple(structures.items()), separate_weight_and_bias)
    how = structures, separate_weight_and_bias
    return tapped.once(key, lambda: _schedule(program, tapped, *how))


def _schedule(
    program: Program,
    tapped: Tapped,
    structures: Mapping[str, str],
    separate_weight_and_bias: bool,
) -> Schedule:
    apart = frozenset(name for name, kind in structures.items() if kind != "kronecker")
    blocks = plan_blocks(tapped.uses, separate_weight_and_bias, apart)
    terms = tuple(term for block in blocks for term in block.terms)
    from_taps, from_graph = _exact_names(program, tapped, structures)
    places: dict[Use, list[tuple[int, int]]] = {}
    for k, term in enumerate(terms):
        for place, use in enumerate(term.uses):
            places.setdefault(use, []).append((k, place))
    at_tap: dict[int, list[Use]] = {}
    exact = {n: tuple(u for u in tapped.uses if n in u.parameters) for n in from_taps}
    exact_of = {u: tuple(n for n in exact if n in u.parameters) for u in tapped.uses}
    for use in tapped.uses:
        if use in places or exact_of[use]:  # not the bias that has joined a weight
            at_tap.setdefault(use.tap, []).append(use)
    return Schedule(
        tapped,
        blocks,
        terms,
        _same_inputs(terms),
        {use: tuple(p) for use, p in places.items()},
        {tap: tuple(uses) for tap, uses in at_tap.items()},
        exact,
        {use: names for use, names in exact_of.items() if names},
        tuple(from_graph),
        _lost(tapped, structures),
    )


def _lost(tapped: Tapped, structures: Mapping[str, str]) -> dict[str, Unsupported]:
    """Parameters that are to have factors, with a use without normal form."""
    lost = {name: use for use in tapped.unsupported for name in use.parameters}
    return {name: use for name, use in lost.items() if structures.get(name) == "kronecker"}


def _exact_names(
    program: Program, tapped: Tapped, structures: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Parameters with exact blocks: those whose taps tell each datum's gradient, and the others.

    One that nothing uses is neither: its block is zero. Where the data are coupled, no gradient is
    one datum's own. The other way looks whether they are, and refuses that; a scale that nobody
    asked an exact block for is taken as everything in KFAC then is.
    """
    names = [name for name, kind in structures.items() if kind in EXACT]
    used = {p for u in tapped.uses for p in u.parameters}
    unknown = {p for u in tapped.uses if u.batch is None for p in u.parameters}
    names = [name for name in names if name in used or name in tapped.uncovered]
    lost = unknown | set(tapped.uncovered)
    if tapped.coupled or tapped.alike:
        chosen = program.structures_for(tapped)
        lost |= {name for name in names if not chosen[name].is_scale}
    return [n for n in names if n not in lost], [n for n in names if n in lost]


def _same_inputs(terms: tuple[TermPlan, ...]) -> tuple[int, ...]:
    """Query, key and value, or parallel branches, read one input, and have one A."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(_rows_of(term, k), k) for k, term in enumerate(terms))


def _rows_of(term: TermPlan, number: int) -> Hashable:
    """Equal for terms with the same rows x̃."""
    if term.is_bias or any(u.form.routes or u.form.folded for u in term.uses):
        return number
    return tuple((_input_of(u), term.scales[place]) for place, u in enumerate(term.uses))


def _input_of(use: Use) -> Hashable:
    form = use.form
    lengths = axis_lengths(form.y, use.y_shape, form.sizes)
    rows = tuple((a, lengths[a]) for a in form.rows)
    axes = (form.x, tuple(form.group), tuple(form.d_in), rows, tuple(form.sizes.items()))
    return (form.input, form.prepare, form.scale, axes, use.batch)
