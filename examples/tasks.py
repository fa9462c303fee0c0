"""What `training.py` trains: a CNN for handwritten digits, and a small GPT for source code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import gpt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

LENGTH, BATCH = 64, 256  # of a stretch of text, and stretches of a batch

Data = tuple[Tensor, Tensor]
Chosen = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        title: For the picture.
        model: Its start, for a seed.
        batches: So many, for a seed.
        measured: The data whose loss counts.
        steps: Of Adam; KFAC has half of them.
        intervals: Of KFAC's factors and decompositions.
        ranges: Of every optimizer's hyperparameters, whose logarithms are drawn uniformly.
        found: What a search with these ranges has found.
    """

    title: str
    model: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Data]]
    measured: Callable[[], Data]
    steps: int
    intervals: dict[str, int]
    ranges: dict[str, dict[str, tuple[float, float]]]
    found: dict[str, Chosen]


@cache
def digits() -> Data:
    """Images of shape (1, 8, 8) in [0, 1] with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target)


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def batches_of_digits(steps: int, seed: int) -> Iterator[Data]:
    """Four of an epoch, shuffled anew in each."""
    generator, (images, labels) = torch.Generator().manual_seed(seed), digits()
    parts: list[Tensor] = []
    for _ in range(steps):
        parts = parts or list(torch.randperm(len(images), generator=generator).chunk(4))
        part = parts.pop()
        yield images[part], labels[part]


@cache
def text() -> tuple[Tensor, Tensor]:
    """What is trained on, and the rest."""
    characters = gpt.text()
    return characters[:-100_000], characters[-100_000:]


def small_gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return gpt.GPT(width=64, depth=2, heads=4, length=LENGTH)


def batches_of_text(steps: int, seed: int) -> Iterator[Data]:
    generator, characters = torch.Generator().manual_seed(seed), text()[0]
    for _ in range(steps):
        starts = torch.randint(len(characters) - LENGTH, (BATCH,), generator=generator)
        yield gpt.windows(characters, starts, LENGTH)


def measured_text() -> Data:
    return gpt.windows(text()[1], torch.arange(64) * 1500, LENGTH)


TASKS = {
    "digits": Task(
        "Handwritten digits, convolutional net",
        convolutional,
        batches_of_digits,
        digits,
        steps=120,
        intervals={"factor_interval": 4, "inverse_interval": 8},
        ranges={
            "KFAC": {
                "lr": (0.05, 0.3),
                "damping": (1e-3, 1e-2),
                "momentum": (0.3, 0.8),
                "kl_clip": (5e-3, 5e-2),
            },
            "Adam": {
                "lr": (5e-3, 5e-2),
                "beta1": (0.5, 0.95),
                "beta2": (0.9, 0.999),
                "eps": (1e-10, 1e-5),
            },
        },
        found={
            "KFAC": {"lr": 0.15, "damping": 0.00114, "momentum": 0.523, "kl_clip": 0.0171},
            "Adam": {"lr": 0.0257, "beta1": 0.57, "beta2": 0.929, "eps": 8.02e-6},
        },
    ),
    "text": Task(
        "Source code, GPT of characters",
        small_gpt,
        batches_of_text,
        measured_text,
        steps=160,
        intervals={"factor_interval": 4, "inverse_interval": 8},
        ranges={
            "KFAC": {
                "lr": (0.2, 0.8),
                "damping": (5e-5, 5e-4),
                "momentum": (0.35, 0.6),
                "kl_clip": (8e-3, 3e-2),
            },
            "Adam": {
                "lr": (1e-2, 5e-2),
                "beta1": (0.5, 0.9),
                "beta2": (0.9, 0.999),
                "eps": (1e-10, 1e-5),
            },
        },
        found={
            "KFAC": {"lr": 0.536, "damping": 8.02e-5, "momentum": 0.413, "kl_clip": 0.0293},
            "Adam": {"lr": 0.0207, "beta1": 0.725, "beta2": 0.946, "eps": 1.26e-9},
        },
    ),
}
