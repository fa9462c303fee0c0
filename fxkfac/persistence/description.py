"""What factors are of -> a description in plain words and numbers, and how two of them differ.

It says what must be equal for factors to mean the same: settings, parameters and their structures,
and of every block its terms, with the place of each parameter entry in (group, in, out), and along
which axes the data are. Two traces of one model have equal descriptions, in whatever process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fxkfac.curvature.options import settings_of
from fxkfac.curvature.plan import BlockPlan, Identity, TermPlan
from fxkfac.curvature.schedule import Schedule, schedule_of
from fxkfac.curvature.settings import Settings
from fxkfac.errors import MergeError
from fxkfac.graph.form import ONLY
from fxkfac.graph.program import Program
from fxkfac.graph.uses.ir import Use
from fxkfac.precision import accurate_dtype

Description = dict[str, Any]  # what JSON holds
MOST = 4  # differences that a message lists


def describe(settings: Settings, plans: Iterable[BlockPlan], like: Tensor) -> Description:
    """Settings, parameters and blocks, and the dtype of their factors."""
    return {
        "settings": {
            "fisher": settings.fisher,
            "sharing": settings.sharing,
            "mc_samples": settings.mc_samples,
            "separate_weight_and_bias": settings.separate_weight_and_bias,
            "masked": settings.masked,
            "loss": settings.loss,
            "dtype": str(accurate_dtype(like)).removeprefix("torch."),
        },
        "parameters": {
            name: {"shape": list(shape), "structure": settings.structures[name]}
            for name, shape in settings.parameters.items()
        },
        "blocks": {plan.name: _block(plan) for plan in plans},
    }


def fingerprint(description: Description) -> str:
    """A digest of a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _block(plan: BlockPlan) -> Description:
    terms = [_term(*pair) for pair in zip(plan.terms, plan.identities, strict=True)]
    return {"parameters": list(plan.parameters), "terms": terms}


def _term(term: TermPlan, identity: Identity) -> Description:
    return {
        "parameters": list(identity.parameters),
        "group in out": list(identity.shape),
        "entries": identity.entries,
        # Of the different ones: a longer sequence may have more uses, in the same way.
        "scales": sorted(map(list, set(term.scales))),
        "batch axes": sorted({_batch_axis(use) for use in term.uses}),
    }


def _batch_axis(use: Use) -> str:
    """Where the data are in the output, whatever the lengths of other axes."""
    if use.batch is None:
        return "unknown"
    if use.batch == ONLY:
        return "no axis"
    axis, outer, inner = use.batch
    laid_out = "·".join(["T"] * (outer > 1) + ["N"] + ["T"] * (inner > 1))
    return f"{laid_out} on axis {use.form.row_position[axis]}"


# --- whether a program is the one that is described ---


def matching(
    program: Program, loss: Any, found: Description, masked: bool
) -> tuple[Settings, Schedule]:
    """The settings of a description and the schedule of that graph of a program which it is of.

    Raises:
        MergeError: It is of another program or loss, with what differs.
    """
    said = found["settings"]
    settings = settings_of(
        program,
        loss,
        said["fisher"],
        said["sharing"],
        said["mc_samples"],
        said["separate_weight_and_bias"],
        masked,
    )
    first: list[str] = []
    for tapped in program.graphs:
        how = settings.structures, settings.separate_weight_and_bias
        schedule = schedule_of(program, tapped, *how)
        here = describe(settings, schedule.blocks, program.like)
        if here == found:
            return settings, schedule
        first = first or list(differences(found, here))
    more = f", and {len(first) - MOST} more" if len(first) > MOST else ""
    raise MergeError(
        f"the file is of another program, loss or mask: {'; '.join(first[:MOST])}{more}. Trace the "
        "model that it was computed with, on inputs of the same kind, and pass the same loss."
    )


def differences(there: Description, here: Description) -> Iterator[str]:
    """How two descriptions differ, the most telling first."""
    for key in there["settings"]:
        if there["settings"][key] != here["settings"][key]:
            yield f"{key} is {there['settings'][key]!r} there and {here['settings'][key]!r} here"
    yield from _by_name(there["parameters"], here["parameters"], "parameter")
    if there["parameters"].keys() == here["parameters"].keys():
        yield from _by_name(there["blocks"], here["blocks"], "block of")


def _by_name(there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> Iterator[str]:
    for where, mine, others in (("there", there, here), ("here", here, there)):
        if only := [name for name in mine if name not in others]:
            yield f"only {where} is a {what} {', '.join(map(repr, only[:MOST]))}"
    for name in there:
        if name in here and there[name] != here[name]:
            yield from _parts(f"{what} {name!r}", there[name], here[name])


def _parts(of: str, there: Any, here: Any) -> Iterator[str]:
    """What differs of two parameters, blocks or terms."""
    for key in there:
        mine, others = there[key], here[key]
        if mine == others:
            continue
        if key == "entries":
            yield f"the {of} has its entries in another order"
        elif key == "terms" and len(mine) == len(others):
            for a, b in zip(mine, others, strict=True):
                yield from _parts(of, a, b)
        elif key == "terms":
            yield f"the {of} has {len(mine)} terms there and {len(others)} here"
        else:
            yield f"the {of} has {key} {mine} there and {others} here"
