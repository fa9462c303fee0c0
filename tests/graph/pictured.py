"""Programs whose networks and pictures are tested, and how to look at a network."""

from __future__ import annotations

from functools import cache

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxkfac


class Tied(nn.Module):
    """One weight in two orientations."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))
        self.b = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.sigmoid(F.linear(x, self.w, self.b)) @ self.w


class Partly(nn.Module):
    """A parameter of each status, and a constant mask that no parameter enters."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.spare = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x):
        return self.frozen(self.linear(x)) * self.log_scale.exp() * (1 - self.mask)


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


class Positions(nn.Module):
    """A table of positions meets the data only where it is added."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 3), nn.Embedding(5, 3)

    def forward(self, tokens):
        return torch.tanh(self.words(tokens) + self.places(torch.arange(5)))


class Attention(nn.Module):
    """Query, key and value from slices of one weight."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))

    def forward(self, x):
        q, k, v = (F.linear(x, part) for part in self.qkv.split(4))
        return F.scaled_dot_product_attention(q, k, v)


def first_layer(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"])


def two_layers(params: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
    return first_layer(params["first"], x) @ params["second"]["w"].T


@cache  # nothing that draws a program changes it
def mlp() -> fxkfac.Program:
    model = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))
    return fxkfac.trace(model, torch.randn(8, 16))


@cache
def cnn() -> fxkfac.Program:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    return fxkfac.trace(model, torch.randn(5, 2, 8, 8))


@cache
def tied() -> fxkfac.Program:
    return fxkfac.trace(Tied(), torch.randn(4, 5))


@cache
def partly(unsupported: str = "skip") -> fxkfac.Program:
    return fxkfac.trace(Partly(), torch.randn(6, 4), unsupported=unsupported)


@cache
def positions() -> fxkfac.Program:
    return fxkfac.trace(Positions(), torch.randint(7, (4, 5)))


@cache
def attention() -> fxkfac.Program:
    return fxkfac.trace(Attention(), torch.randn(3, 6, 4))


@cache
def functional() -> fxkfac.Program:
    params = {
        "first": {"w": torch.randn(4, 5), "b": torch.randn(5)},
        "second": {"w": torch.randn(2, 5)},
    }
    return fxkfac.trace(two_layers, torch.randn(3, 4), params)


PROGRAMS = [mlp, cnn, tied, partly, positions, attention, functional]


def of_kind(network: nx.MultiDiGraph, kind: str) -> dict[str, dict]:
    """Nodes of one kind, by name."""
    return {n["name"]: n for _, n in network.nodes(data=True) if n["kind"] == kind}


def uses(network: nx.MultiDiGraph) -> list[tuple[str, str, dict]]:
    """Every edge from a parameter to an op: the parameter's name, the op, the attributes."""
    edges = network.edges(data=True)
    return [(network.nodes[u]["name"], v, e) for u, v, e in edges if e["kind"] == "parameter"]
