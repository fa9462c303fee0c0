"""What every parameter's block is made of: as asked for, or as its uses allow.

Every parameter has exactly one structure. A matrix gets Kronecker factors; a scale (each entry is
multiplied by one number) its exact diagonal, which is the better and the cheaper one; a parameter
with a use that has no normal form what the policy `unsupported` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fxkfac.errors import OptionError
from fxkfac.functional import FunctionalModel, select
from fxkfac.graph.tapped import Tapped
from fxkfac.graph.uses.ir import Use
from fxkfac.ranges import require_not_negative

T = TypeVar("T")

STRUCTURES = ("kronecker", "diagonal", "dense", "identity", "derived", "skip")
EXACT = ("diagonal", "dense")  # made from every datum's own gradient
NONE = ("derived", "skip")  # no block: another one has it, or nobody
POLICIES = ("error", "diagonal", "dense", "identity", "skip")


@dataclass(frozen=True)
class Choice:
    """The structure of one parameter's block, and why it has it."""

    structure: str
    reason: str
    is_scale: bool = False  # nobody asked for this diagonal
    is_free: bool = False  # it is zero, and costs nothing


@dataclass(frozen=True)
class Structures:
    """What the user asked for.

    Attributes:
        selected: All parameters whose curvature is asked for, in order.
        wanted: The structure of those for which one is named.
        unsupported: What happens to the others where a use has no normal form.
        dense_limit: Most entries that a parameter with a dense block may have.
        apart: In how many parts along axis 0 a weight is taken.
    """

    selected: tuple[str, ...]
    wanted: Mapping[str, str] = field(default_factory=dict)
    unsupported: str = "error"
    dense_limit: int = 2**14
    apart: Mapping[str, int] = field(default_factory=dict)

    @property
    def tapped(self) -> tuple[str, ...]:
        """The parameters for which something has to be computed."""
        return tuple(n for n in self.selected if self.wanted.get(n) not in ("skip", "identity"))

    @property
    def derived(self) -> tuple[str, ...]:
        """The parameters that are tapped through the weight that is computed from them."""
        return tuple(n for n in self.selected if self.wanted.get(n) == "derived")

    def has_own(self, name: str) -> bool:
        """Whether a parameter is to have a block that curvature is found for."""
        return name in self.selected and self.wanted.get(name) not in ("identity", *NONE)

    def refuses(self, name: str) -> bool:
        """Whether it is an error that this parameter has a use without normal form."""
        return self.unsupported == "error" and self.wanted.get(name, "kronecker") == "kronecker"

    def exact_if_lost(self, name: str) -> bool:
        """Whether its block is exact, from the graph alone, where it has no normal form."""
        wanted = self.wanted.get(name, "kronecker")
        return (self.unsupported if wanted == "kronecker" else wanted) in EXACT

    def choose(self, tapped: Tapped, sizes: Mapping[str, int]) -> dict[str, Choice]:
        """The structure of every selected parameter, given its uses."""
        names = [*self.selected, *tapped.derived]
        uses: dict[str, list[Use]] = {name: [] for name in names}
        for use in tapped.uses:
            for name in use.parameters:
                uses[name].append(use)
        lost = {name: u.reason for u in reversed(tapped.unsupported) for name in u.parameters}
        chosen = {
            name: self._choice(name, uses[name], lost.get(name), sizes[name], tapped)
            for name in names
        }
        self._agree(chosen, tapped.uses)
        _require_alike_in_use(chosen, tapped.uses)
        for name, choice in chosen.items():
            if choice.structure == "dense" and sizes[name] > self.dense_limit:
                raise OptionError(
                    f"a dense block of {name!r} would have {sizes[name]:,}² entries; expected "
                    f"at most {self.dense_limit:,}². Choose 'diagonal', or raise dense_limit."
                )
        return chosen

    def _choice(
        self, name: str, uses: Sequence[Use], lost: str | None, size: int, tapped: Tapped
    ) -> Choice:
        wanted = self.wanted.get(name)
        if wanted is not None and not (wanted == "kronecker" and lost):
            through = "through the weight that is computed from it"
            return Choice(wanted, through if wanted == "derived" else "as asked for")
        if lost:
            return Choice(self.unsupported, lost)
        if not uses:
            return Choice("diagonal", "no use: its curvature is zero", is_free=True)
        if all(u.form.is_elementwise for u in uses):
            reason = f"a scale: each entry is multiplied by one number{_inexact(tapped)}"
            return Choice("diagonal", reason, is_scale=True)
        alone = [u for u in uses if (u.is_bias and not u.join) or u.form.is_elementwise]
        if len(alone) == len(uses) and size > self.dense_limit:
            return Choice("diagonal", f"added to the data; more than {self.dense_limit:,} entries")
        if len(alone) == len(uses) and any(u.form.is_elementwise for u in uses):
            return Choice("dense", "multiplied by the data and added to them: one exact block")
        if len(alone) == len(uses):
            return Choice("kronecker", "added to the data: one exact block")
        return Choice("kronecker", f"{len(uses)} linear use{'s' * (len(uses) > 1)}")

    def _agree(self, chosen: dict[str, Choice], uses: Sequence[Use]) -> None:
        """Where parameters are one operand and one of them has factors, so have those left free."""
        before = None
        while before != chosen:
            before = dict(chosen)
            for use in uses:
                if any(chosen[name].structure == "kronecker" for name in use.parameters):
                    free = [n for n in use.parameters if n not in self.wanted]
                    joined = Choice("kronecker", "one operand together with other parameters")
                    chosen |= {n: joined for n in free if chosen[n].structure in EXACT}


def _inexact(tapped: Tapped) -> str:
    """Why the diagonal of a scale is not exact, or not known to be so."""
    if tapped.coupled:
        return "; not exact, since the data are coupled"
    if tapped.alike:
        return "; exact if the data are not coupled: those of the example are alike and do not tell"
    return ""


def _require_alike_in_use(chosen: dict[str, Choice], uses: Sequence[Use]) -> None:
    """Parameters that are one operand, as after `cat`, have one structure."""
    for use in uses:
        kinds = {name: chosen[name].structure for name in use.parameters}
        if len(set(kinds.values())) > 1 and "kronecker" in kinds.values():
            raise OptionError(
                f"{use.op} takes one operand of several parameters, with structures {kinds}; "
                "expected one structure. Name the same one for all of them in `structure`."
            )


def structures_of(
    bound: FunctionalModel,
    structure: Mapping[str, str] | None,
    unsupported: str,
    dense_limit: int,
    apart: Mapping[str, int] | None = None,
) -> Structures:
    """Match the patterns in `structure`; a later one overrides an earlier one.

    Raises:
        OptionError: There is no such structure or policy, or what should be a mapping is none.
        UnknownParameter: A pattern matches nothing.
    """
    if unsupported not in POLICIES:
        raise OptionError(f"unsupported={unsupported!r}; expected one of {', '.join(POLICIES)}.")
    wanted: dict[str, str] = {}
    for pattern, kind in _by_pattern("structure", structure, "diagonal"):
        if kind not in STRUCTURES:
            raise OptionError(
                f"structure[{pattern!r}] is {kind!r}; expected one of {', '.join(STRUCTURES)}."
            )
        wanted |= {name: kind for name in select(bound, pattern) if name in bound.selected}
    require_not_negative("dense_limit", dense_limit)
    parts: dict[str, int] = {}
    for pattern, number in _by_pattern("apart", apart, 4):
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"apart[{pattern!r}] is {number!r}; expected a number of parts.")
        parts |= dict.fromkeys(select(bound, pattern), number)
    return Structures(bound.selected, wanted, unsupported, dense_limit, parts)


def _by_pattern(option: str, value: Mapping[str, T] | None, such_as: T) -> Iterable[tuple[str, T]]:
    if value is not None and not isinstance(value, Mapping):
        raise OptionError(
            f"{option} is {value!r:.80}; expected a mapping from names or shell patterns, such as "
            f"{{'*': {such_as!r}}}."
        )
    return (value or {}).items()
