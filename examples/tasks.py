"""What `training.py` trains: a CNN for handwritten digits, and a small GPT for source code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import gpt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

LENGTH = 64  # of a stretch of text

Data = tuple[Tensor, Tensor]
Chosen = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        title: For the picture.
        model: Always with the same start.
        batches: So many, always the same.
        measured: The data whose loss counts.
        steps: Of Adam.
        share: The part of these that KFAC has.
        fixed: Hyperparameters of KFAC that are not drawn.
        ranges: Of every optimizer's hyperparameters, whose logarithms are drawn uniformly.
        found: What a search with these ranges has found.
    """

    title: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Data]]
    measured: Callable[[], Data]
    steps: int
    share: float
    fixed: Chosen
    ranges: dict[str, dict[str, tuple[float, float]]]
    found: dict[str, Chosen]


@cache
def digits() -> Data:
    """Images of shape (1, 8, 8) in [0, 1] with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
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


def batches_of_digits(steps: int) -> Iterator[Data]:
    """Seven of an epoch, shuffled anew in each."""
    generator, (images, labels) = torch.Generator().manual_seed(1), digits()
    parts: list[Tensor] = []
    for _ in range(steps):
        parts = parts or list(torch.randperm(len(images), generator=generator).chunk(7))
        part = parts.pop()
        yield images[part], labels[part]


@cache
def text() -> tuple[Tensor, Tensor]:
    """What is trained on, and the rest."""
    characters = gpt.text()
    return characters[:-100_000], characters[-100_000:]


def small_gpt() -> nn.Module:
    torch.manual_seed(0)
    return gpt.GPT(width=64, depth=2, heads=4, length=LENGTH)


def batches_of_text(steps: int) -> Iterator[Data]:
    generator, characters = torch.Generator().manual_seed(1), text()[0]
    for _ in range(steps):
        starts = torch.randint(len(characters) - LENGTH, (32,), generator=generator)
        yield gpt.windows(characters, starts, LENGTH)


def measured_text() -> Data:
    return gpt.windows(text()[1], torch.arange(64) * 1500, LENGTH)


TASKS = {
    "digits": Task(
        "Handwritten digits, convolutional net",
        convolutional,
        batches_of_digits,
        digits,
        steps=160,
        share=0.5,
        fixed={"momentum": 0.8, "kl_clip": 3e-3},
        ranges={
            "KFAC": {"lr": (3e-2, 0.2), "damping": (3e-3, 3e-2)},
            "Adam": {"lr": (3e-3, 3e-2), "eps": (1e-10, 1e-5)},
        },
        found={"KFAC": {"lr": 0.1, "damping": 8.9e-3}, "Adam": {"lr": 0.013, "eps": 2.4e-8}},
    ),
    "text": Task(
        "Source code, GPT of characters",
        small_gpt,
        batches_of_text,
        measured_text,
        steps=200,
        share=0.6,
        fixed={"momentum": 0.6, "kl_clip": 5e-3},
        ranges={
            "KFAC": {"lr": (0.1, 1.0), "damping": (5e-4, 2e-3)},
            "Adam": {"lr": (3e-3, 3e-2), "eps": (1e-10, 1e-5)},
        },
        found={"KFAC": {"lr": 0.28, "damping": 5.7e-4}, "Adam": {"lr": 0.016, "eps": 1.2e-7}},
    ),
}
