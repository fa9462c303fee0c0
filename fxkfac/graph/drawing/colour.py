"""Numbers of parameters -> colours: what the caller wants to see in the drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.graph.drawing.shown import shown_at
from fxkfac.parameters import canonical_names

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

# From pale to dark, so that the scale holds in grey and for every eye.
RAMP = ("#FFFAE3", "#FBDF8F", "#F2A93B", "#C8611B", "#7A2E12")
DARK, LIGHT = "#111418", "#FFFFFF"
DECADES = 2.0  # positive numbers that span more than these are put on a logarithmic scale


@dataclass(frozen=True)
class Scale:
    """Numbers of parameters, and the colours that say how large they are.

    Attributes:
        name: What the numbers are.
        values: One for each parameter that has one.
        logarithmic: Whether equal steps of colour are equal ratios.
    """

    name: str
    values: Mapping[str, float]
    logarithmic: bool

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        return min(self.values.values()), max(self.values.values())

    def of(self, names: Iterable[str]) -> list[float]:
        """The numbers of some parameters, as far as they have one."""
        return [self.values[name] for name in names if name in self.values]

    def fill(self, value: float) -> str:
        """The colour of a number."""
        low, high, at = (self._position(number) for number in (*self.ends, value))
        return blend((at - low) / (high - low) if high > low else 0.5)

    def steps(self, count: int) -> list[str]:
        """Colours from the smallest to the largest number."""
        return [blend(k / (count - 1)) for k in range(count)]

    def _position(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def scale_of(program: Program, colour: Mapping[str, float], name: str) -> Scale:
    """The scale of the caller's numbers.

    Args:
        program: Whose parameters they belong to; a tied one may have any of its names.
        colour: A finite number for each parameter that is to be coloured. That of a weight which is
            computed from parameters is theirs; of several it is the largest.
        name: What the numbers are.

    Raises:
        UnknownParameter: A name is not among the parameters.
        NonFiniteError: A number is NaN or infinite.
        OptionError: There are none, something is no number, or two are of one parameter.
    """
    if not isinstance(colour, Mapping) or not colour:
        found = "an empty mapping" if isinstance(colour, Mapping) else type(colour).__name__
        raise OptionError(
            f"colour is {found}; expected a mapping from names of parameters to numbers, such as "
            "{'0.weight': 1.5}. Leave it out to draw without."
        )
    named = canonical_names(colour, lambda key: program.model.aliases.get(key, key))
    values: dict[str, float] = {}
    for key, value in colour.items():
        number = _number(key, value)
        for parameter in shown_at(program, named[key]):
            values[parameter] = max(number, values.get(parameter, number))
    low, high = min(values.values()), max(values.values())
    return Scale(name, values, low > 0 and math.log10(high) - math.log10(low) > DECADES)


def _number(key: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"colour[{key!r}] is of type {type(value).__name__}, {value!r:.60}; expected a number."
        ) from error
    if not math.isfinite(number):
        raise NonFiniteError(
            f"colour[{key!r}] is {number}; expected a finite number. Leave the parameter out, or "
            "give a number that is finite (of a singular block: its condition after damping)."
        )
    return number


def number_text(values: Sequence[float]) -> str:
    """One number in three digits, or the range of several."""
    ends = dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values)))
    return " … ".join(ends)


def blend(position: float) -> str:
    """A colour of the ramp, for a position from 0 to 1."""
    at = position * (len(RAMP) - 1)
    k = min(int(at), len(RAMP) - 2)
    one, other = list(pairwise(RAMP))[k]
    mixed = (
        round(a + (at - k) * (b - a)) for a, b in zip(_channels(one), _channels(other), strict=True)
    )
    return "#" + "".join(f"{channel:02X}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Dark or light, whichever is read more easily on a colour (WCAG 2.2, contrast ratio)."""
    linear = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in _parts(fill))
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return DARK if luminance > 0.195 else LIGHT


def _channels(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]


def _parts(colour: str) -> list[float]:
    return [channel / 255 for channel in _channels(colour)]
