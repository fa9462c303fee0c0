"""What the caller says of parameters -> plain data for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.graph.drawing.shown import shown_at

if TYPE_CHECKING:
    from fxkfac.graph.program import Program

Details = Mapping[str, list[dict[str, Any]]]  # by name of a parameter
POINTS = 400  # of a curve; the panel is no wider


def details_of(program: Program, details: Mapping[str, Mapping[str, Any]]) -> Details:
    """Details as the page takes them.

    Args:
        program: Whose parameters they belong to; a tied one may have any of its names.
        details: For names of parameters, names with numbers, texts or sequences of numbers. What is
            said of a weight that is computed from parameters stands at each of them.

    Raises:
        UnknownParameter: A name is not among the parameters.
        NonFiniteError: A sequence holds NaN or an infinite number.
        OptionError: Something is neither a number, nor a text, nor a sequence of numbers.
    """
    if not isinstance(details, Mapping):
        raise OptionError(
            f"details is of type {type(details).__name__}; expected a mapping from names of "
            "parameters to what is said of them, as fxkfac.spectra gives it."
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for key, facts in details.items():
        if not isinstance(facts, Mapping):
            raise OptionError(
                f"details[{key!r}] is of type {type(facts).__name__}; expected a mapping from "
                "names to numbers, texts or sequences of numbers."
            )
        of = f" of {key}" if key in program.tapped.derived else ""
        said = [_fact(f"details[{key!r}][{name!r}]", f"{name}{of}", v) for name, v in facts.items()]
        for parameter in shown_at(program, key):
            found.setdefault(parameter, []).extend(said)
    return found


def _fact(place: str, name: str, value: Any) -> dict[str, Any]:
    """A text, or a curve: the positive numbers from the largest to the smallest."""
    if isinstance(value, str):
        return {"name": name, "text": value}
    try:
        if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
            return {"name": name, "text": f"{float(value):.6g}"}
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"{place} is of type {type(value).__name__}, {value!r:.60}; expected a number, a text "
            "or a sequence of numbers."
        ) from error
    if bad := sum(not math.isfinite(number) for number in numbers):
        raise NonFiniteError(
            f"{place} holds {bad} of {len(numbers)} numbers that are NaN or infinite; expected "
            "finite ones. Leave them out, or give the whole as a text."
        )
    curve = sorted((number for number in numbers if number > 0), reverse=True)
    lost = len(numbers) - len(curve)
    return {"name": name, "curve": _thinned(curve), "count": len(numbers), "lost": lost}


def _thinned(curve: list[float]) -> list[float]:
    if len(curve) <= POINTS:
        return curve
    return [curve[round(k * (len(curve) - 1) / (POINTS - 1))] for k in range(POINTS)]
