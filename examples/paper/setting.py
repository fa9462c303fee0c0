"""What the files of this folder share: data, nets, and what it means that two things are the same.

All of it is float64, and the same in every run. A file's public functions are its claims: each
prints what is seen, and fails where the paper's statement is not so.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getdoc, isfunction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fxkfac
from fxkfac.likelihoods.backpropagation import backpropagated_vectors


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=numbers(seed))


def classes(*shape: int, count: int = 3, seed: int = 0) -> Tensor:
    """Class indices."""
    return torch.randint(count, shape, generator=numbers(seed))


def numbers(seed: int) -> torch.Generator:
    """A source of random numbers."""
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int, activation: type[nn.Module] | None = nn.Tanh, seed: int = 0) -> nn.Sequential:
    """Linear layers with biases and activations between them; with `None`, a deep linear net."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [activation()] if layers and activation else []
        layers.append(nn.Linear(d_in, d_out, dtype=torch.float64))
    net = nn.Sequential(*layers)
    generator = numbers(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
    return net


def layers_of(net: nn.Module) -> list[list[str]]:
    """The names of weight and bias of every linear layer."""
    linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    return [[f"{name}.weight", f"{name}.bias"] for name in linear]


def backpropagated(
    fisher: str, loss: nn.Module, f: Tensor, y: Tensor, mc_samples: int = 1
) -> list[Tensor]:
    """The vectors ▲ that a flavour sends back from predictions f (N, C)."""
    position = torch.arange(f.shape[1]).expand_as(f)  # of every element within its own datum
    likelihood = fxkfac.likelihood_of(loss)
    made = backpropagated_vectors(fisher, likelihood, f, y, position, mc_samples, numbers(0))
    return list(made)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def mean_square(errors: list) -> Tensor:
    """√ of the mean square over the first axis."""
    return torch.tensor(errors).square().mean(0).sqrt()


def rounded(t: Tensor) -> list:
    """For printing: four digits behind the point."""
    return (t.detach() + 0.0).round(decimals=4).tolist()


def claims(file: Mapping[str, Any]) -> dict[str, Any]:
    """The public functions that a file defines itself."""
    return {
        name: f
        for name, f in file.items()
        if isfunction(f) and f.__module__ == file["__name__"] and not name.startswith("_")
    }


def run(file: Mapping[str, Any]) -> None:
    """Make every claim of a file, and say which."""
    for name, claim in claims(file).items():
        print(f"\n{name}: {(getdoc(claim) or '').splitlines()[0]}")
        claim()
