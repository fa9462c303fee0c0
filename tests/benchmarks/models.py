"""The models, as plain modules with linear and convolutional layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxkfac


def mlp(widths: tuple[int, ...], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A stack of convolutions beside a shortcut, which is one itself where the shape changes."""

    def __init__(self, stack: list[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.stack, self.shortcut = nn.Sequential(*stack), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Of images (N, C, H, W)."""
        return F.relu(self.stack(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = inputs == outputs and stride == 1
    return nn.Identity() if same else _convolution(inputs, outputs, 1, stride)


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    first, second = _convolution(inputs, width, 3, stride), _convolution(width, width, 3)
    return Residual([first, nn.ReLU(), second], _shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 with the stride, 1x1 to four times the width."""
    first, second = _convolution(inputs, width, 1), _convolution(width, width, 3, stride)
    stack = [first, nn.ReLU(), second, nn.ReLU(), _convolution(width, 4 * width, 1)]
    return Residual(stack, _shortcut(inputs, 4 * width, stride))


def small_resnet(widths: tuple[int, ...], blocks: int, classes: int) -> nn.Sequential:
    """A 3x3 stem and basic blocks, halving the image at each new width."""
    layers: list[nn.Module] = [_convolution(3, widths[0], 3), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(basic(inputs, width, 2 if stage > 0 and block == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def bottleneck_resnet(width: int, depths: tuple[int, ...], classes: int) -> nn.Sequential:
    """The shape of ResNet-50 for a width of 64 and depths 3-4-6-3."""
    stem = _convolution(3, width, 7, 2)
    layers: list[nn.Module] = [stem, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            inner = width * 2**stage
            layers.append(bottleneck(inputs, inner, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * inner
    return nn.Sequential(*layers, *_head(inputs, classes))


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


class Attention(nn.Module):
    """Causal self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of sequences (N, T, width)."""
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), mlp((width, 4 * width, width), nn.GELU)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Of sequences (N, T, width)."""
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A causal language model, with a head of its own weights."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens (N, T) to logits (N, vocabulary, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.layers(h))).movedim(-1, 1)


class PoissonResidual(nn.Module):
    """The residual of -Δu = f for a net u, by the forward Laplacian."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp((2, *[width] * hidden, 1), nn.Tanh)

    def forward(self, points: Tensor) -> Tensor:
        """From points (N, 2) to residuals (N, 1)."""
        f = 2 * torch.pi**2 * torch.sin(torch.pi * points).prod(1, keepdim=True)
        return fxkfac.laplacian(self.net, points).laplacian + f
