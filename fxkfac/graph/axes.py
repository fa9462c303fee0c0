"""Axis lists, as einops writes them: `n (g o) 1 p0`, names, brackets and unit axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache


def letters(axes: str) -> list[str]:
    """The axis names in an einops axis list, without unit axes and brackets."""
    return list(_letters(axes))


def axis_tokens(axes: str) -> list[str]:
    """The axes of the tensor itself: names, units, and brackets with what is in them."""
    return re.findall(r"\([^)]*\)|\S+", axes)


@lru_cache(maxsize=1024)  # asked for at every use of every batch
def _letters(axes: str) -> tuple[str, ...]:
    return tuple(a for a in re.findall(r"\w+", axes) if not a.isdigit())


def axis_lengths(axes: str, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """Length of every named axis of a tensor, those inside brackets included."""
    lengths = dict(known)
    for token, size in zip(axis_tokens(axes), shape, strict=True):
        open_axes = [a for a in letters(token) if a not in lengths]
        inside = math.prod(lengths[a] for a in letters(token) if a in lengths)
        if open_axes:
            lengths[open_axes[0]] = size // inside
    return lengths


def renamed(axes: str, names: Mapping[str, str]) -> str:
    """Replace axis names; a name that becomes several is bracketed unless it already is."""
    out, depth = [], 0
    for token in re.findall(r"\w+|[()]", axes):
        depth += (token == "(") - (token == ")")
        new = names.get(token, token)
        out.append(f"({new})" if " " in new and depth == 0 else new)
    return " ".join(out).replace("( ", "(").replace(" )", ")")
