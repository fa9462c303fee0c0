"""A step of Adam for the parameters of a group, with the states that `torch.optim.Adam` keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


def named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters of a group, with their names."""
    return list(zip(group["param_names"], group["params"], strict=True))


def move_by_adam(
    group: Mapping[str, Any], gradients: Mapping[str, Tensor], state: Mapping[Tensor, Any]
) -> None:
    """Move the parameters of a group in place.

    Args:
        group: Its options, as of `KFAC`.
        gradients: By name; weight decay that is not decoupled is in them already.
        state: That of the optimizer.
    """
    states = [state[θ] for _, θ in named(group)]
    for (_, θ), held in zip(named(group), states, strict=True):
        if not held:
            held["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            held["exp_avg"], held["exp_avg_sq"] = torch.zeros_like(θ), torch.zeros_like(θ)
    adam(
        [θ for _, θ in named(group)],
        [gradients[name] for name, _ in named(group)],
        [held["exp_avg"] for held in states],
        [held["exp_avg_sq"] for held in states],
        [],
        [held["step"] for held in states],
        decoupled_weight_decay=group["decoupled"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"] if group["decoupled"] else 0.0,
        eps=group["eps"],
        maximize=False,
    )
