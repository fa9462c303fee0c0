"""Targets of the command line: a small convolutional net on scikit-learn's handwritten digits.

fxkfac trace examples/target.py
fxkfac factors examples/target.py --fisher mc -o factors.safetensors
fxkfac check examples/target.py:functional
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxkfac

Target = tuple[nn.Module | fxkfac.Program, nn.Module, DataLoader]


def loader() -> DataLoader:
    """1,797 images of shape (1, 8, 8) in [0, 1] with their labels, shuffled, in batches."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return DataLoader(TensorDataset(images, torch.tensor(data.target)), 128, shuffle=True)


def target() -> Target:
    """A module, which the command line traces. Its numbers are those of --seed."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return model, nn.CrossEntropyLoss(), loader()


def functional() -> Target:
    """A function of its parameters, traced here, since only here they are known."""
    params = {"hidden": {"W": torch.randn(64, 16) / 8, "b": torch.zeros(16)}}
    params["head"] = {"W": torch.randn(10, 16) / 4}

    def model(params: dict[str, dict[str, Tensor]], images: Tensor) -> Tensor:
        h = torch.tanh(images.flatten(1) @ params["hidden"]["W"] + params["hidden"]["b"])
        return torch.einsum("nh,oh->no", h, params["head"]["W"])

    data = loader()
    images, _ = next(iter(data))
    return fxkfac.trace(model, images, params), nn.CrossEntropyLoss(), data
