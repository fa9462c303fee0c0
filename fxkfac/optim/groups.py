"""Options by names and patterns -> the groups of a `torch.optim.Optimizer`.

And whether what it was made with is still so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fxkfac.curvature.settings import Settings
from fxkfac.errors import MergeError, OptionError, ParameterError
from fxkfac.functional import FunctionalModel, select
from fxkfac.likelihoods.losses import loss_text
from fxkfac.ranges import (
    require,
    require_flag,
    require_fraction,
    require_not_negative,
    require_positive,
)

OF_KFAC = ("lr", "momentum", "weight_decay", "decoupled")
OF_ADAM = ("betas", "eps", "weight_decay", "decoupled")


def grouped(
    model: FunctionalModel,
    tensors: Mapping[str, Tensor],
    covered: Collection[str],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A group of KFAC and one of Adam, where there are such parameters, of each of the user's.

    Args:
        model: Knows the names.
        tensors: The selected parameters.
        covered: Names of those with curvature.
        groups: The user's, for some of the parameters.
        defaults: All options, for the rest, and for what a group does not say.
    """
    several = isinstance(groups, Iterable)
    require(several, f"groups is {groups!r:.80}; expected a list of dicts, with 'params' in each.")
    taken: set[str] = set()
    made: list[dict[str, Any]] = []
    for group in groups:
        names = _chosen(model, tensors, group)
        if twice := sorted(taken & names):
            raise OptionError(f"{twice[:4]} are in two of the groups; expected one for each.")
        taken |= names
        options = {**defaults, **{k: v for k, v in group.items() if k != "params"}}
        require_known(options, defaults)
        made += _by_method(names, tensors, covered, options)
    return made + _by_method(set(tensors) - taken, tensors, covered, defaults)


def _chosen(
    model: FunctionalModel, tensors: Mapping[str, Tensor], group: Mapping[str, Any]
) -> set[str]:
    mapping = isinstance(group, Mapping)
    require(mapping, f"a group is {group!r}; expected a list of dicts, with 'params' in each.")
    require("params" in group, f"a group has the keys {sorted(group)}; expected 'params' too.")
    names = select(model, group["params"]) & set(tensors)
    require(
        bool(names),
        f"the group of {group['params']!r} holds none of the parameters that were selected when "
        "tracing; expected at least one.",
    )
    return names


def require_known(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise `OptionError` for an option that there is not."""
    more = sorted(set(options) - set(known))
    require(not more, f"a group has the options {more}; there are: {sorted(known)}.")


def _by_method(
    names: set[str],
    tensors: Mapping[str, Tensor],
    covered: Collection[str],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    options = {**options, **_in_range(options)}
    kfac = {"method": "kfac", **{key: options[key] for key in OF_KFAC}}
    adam = {"method": "adam", "lr": options["adam_lr"], **{key: options[key] for key in OF_ADAM}}
    made = []
    for group, with_curvature in ((kfac, True), (adam, False)):
        params = [
            (n, t) for n, t in tensors.items() if n in names and (n in covered) == with_curvature
        ]
        if params:
            made.append({"params": params, **group})
    return made


def _in_range(options: Mapping[str, Any]) -> dict[str, Any]:
    betas = options["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2
    require(pair, f"betas={betas!r}; expected two numbers, such as (0.9, 0.999).")
    return {
        **{n: require_not_negative(n, options[n]) for n in ("lr", "adam_lr", "weight_decay")},
        "momentum": require_fraction("momentum", options["momentum"]),
        "decoupled": require_flag("decoupled", options["decoupled"]),
        "betas": tuple(require_fraction("betas", beta) for beta in betas),
        "eps": require_positive("eps", options["eps"]),
    }


def require_held(
    trained: Iterable[tuple[str, Tensor]], held: Mapping[str, Tensor], frozen: Collection[str]
) -> None:
    """Raise `ParameterError` unless what is trained is what the model holds, and may be trained.

    Args:
        trained: The parameters of all groups, with their names.
        held: The tensors in which the user holds them now.
        frozen: Names of those that never required a gradient, and are trained all the same.
    """
    for name, θ in trained:
        if held[name] is not θ:
            raise ParameterError(
                f"the model holds another tensor as {name!r} than when this optimizer was made; "
                "expected the same, whose values may change, as by load_state_dict without "
                "assign=True. Make an optimizer anew, and load the state of this one."
            )
        if not θ.requires_grad and name not in frozen:
            raise ParameterError(
                f"{name!r} was frozen by requires_grad_(False) since this optimizer was made; "
                "expected a parameter that is trained. Trace the model and make an optimizer anew: "
                "they are of those parameters that require a gradient then."
            )


def require_same_loss(loss: Any, settings: Settings) -> None:
    """Raise `MergeError` unless the loss is, with all of its options, that of the settings."""
    if (now := loss_text(loss)) != settings.loss:
        raise MergeError(
            f"the loss is {now} now, and was {settings.loss} when this optimizer was made; "
            "expected the same, since averages are of one loss. Make an optimizer anew, and load "
            "the state of this one where its averages and momenta should go on."
        )


def require_same_groups(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> None:
    """Raise `OptionError` unless the groups of a state are of the same parameters in one order."""
    theirs, mine = ([list(g["param_names"]) for g in groups] for groups in (found, expected))
    if theirs != mine:
        raise OptionError(
            f"the state has groups of the parameters {_some(theirs)}; expected {_some(mine)}, in "
            "this order. Make the optimizer with the program and the groups that the state is of."
        )


def _some(groups: Sequence[Sequence[str]]) -> str:
    return "; ".join(", ".join(names[:4]) + ", .." * (len(names) > 4) for names in groups[:4])
