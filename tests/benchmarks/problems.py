"""The problems: model, loss and data, each at its full size and at a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import models

Batch = tuple[Tensor, Tensor]
SEED = 0
STEP = "step"  # loss, gradient and MC factors in one pass


@dataclass(frozen=True)
class Problem:
    """What all libraries get.

    Attributes:
        model: Its linear and convolutional layers require gradients, nothing else does.
        loss: Reduced by the mean.
        batches: Pairs of inputs and targets.
        joint: Whether weight and bias share a block.
    """

    model: nn.Module
    loss: nn.Module
    batches: list[Batch]
    joint: bool = True

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Linear and convolutional layers by name."""
        return {name: m for name, m in self.model.named_modules() if _is_layer(m)}

    @property
    def params(self) -> list[Tensor]:
        """Weights and biases of all layers."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def n(self) -> int:
        """Number of data."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def terms(self) -> int:
        """Number of loss terms over which the mean is taken."""
        return sum(y.numel() for _, y in self.batches)


@dataclass(frozen=True)
class Spec:
    """A problem before it is built: `build(tiny)`.

    Attributes:
        title: What stands in the table.
        flavours: Those that are measured.
        build: From whether the size is tiny to the problem.
        repeats: How often at most each library is timed.
        memory: Flavours for which first call and peak memory are measured.
    """

    title: str
    flavours: tuple[str, ...]
    build: Callable[[bool], Problem]
    repeats: int
    memory: tuple[str, ...] = ("mc", "type-2", STEP)

    def make(self, tiny: bool, device: str = "cpu") -> Problem:
        """Build it, the same at each call, with all but the layers frozen."""
        torch.backends.cudnn.allow_tf32 = False  # so that all of it is in single precision
        torch.manual_seed(SEED)
        problem = self.build(tiny)
        model = problem.model.eval().requires_grad_(False).to(device)
        for layer in problem.layers.values():
            layer.requires_grad_(True)
        batches = [(x.to(device), y.to(device)) for x, y in problem.batches]
        return replace(problem, model=model, batches=batches)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _vectors(n: int, width: int, classes: int) -> Batch:
    return torch.randn(n, width), torch.randint(classes, (n,))


def _images(n: int, size: int, classes: int) -> Batch:
    return torch.randn(n, 3, size, size), torch.randint(classes, (n,))


def _text(n: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(vocabulary, (n, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _mlp(tiny: bool) -> Problem:
    widths = (8, 12, 6, 4) if tiny else (784, 1024, 512, 256, 128, 64, 10)
    data = _vectors(16 if tiny else 512, widths[0], widths[-1])
    return Problem(models.mlp(widths), nn.CrossEntropyLoss(), [data])


def _mini_batches(tiny: bool) -> Problem:
    problem, (count, n) = _mlp(tiny), (3, 5) if tiny else (1000, 32)
    layers = list(problem.layers.values())
    width, classes = layers[0].weight.shape[1], layers[-1].weight.shape[0]
    batches = [_vectors(n, width, classes) for _ in range(count)]
    return Problem(problem.model, problem.loss, batches)


def _resnet(tiny: bool) -> Problem:
    widths, blocks = ((4, 6), 1) if tiny else ((32, 64, 128), 2)
    data = _images(8, 8, 4) if tiny else _images(64, 32, 10)
    model = models.small_resnet(widths, blocks, 4 if tiny else 10)
    return Problem(model, nn.CrossEntropyLoss(), [data])


def _resnet50(tiny: bool) -> Problem:
    data = _images(6, 16, 5) if tiny else _images(16, 64, 1000)
    sizes = (4, (1, 1), 5) if tiny else (64, (3, 4, 6, 3), 1000)
    return Problem(models.bottleneck_resnet(*sizes), nn.CrossEntropyLoss(), [data])


def _gpt(tiny: bool) -> Problem:
    model = models.GPT(1, 8, 2, 6, 7) if tiny else models.GPT(4, 192, 4, 128, 65)
    return Problem(model, nn.CrossEntropyLoss(), [_text(4, 6, 7) if tiny else _text(8, 128, 65)])


def _gpt2(tiny: bool) -> Problem:
    model = models.GPT(2, 8, 2, 6, 11) if tiny else models.GPT(12, 256, 4, 256, 5000)
    data = _text(4, 6, 11) if tiny else _text(4, 256, 5000)
    return Problem(model, nn.CrossEntropyLoss(), [data])


def _poisson(tiny: bool) -> Problem:
    points = torch.rand(12 if tiny else 1000, 2)
    model = models.PoissonResidual(6, 2) if tiny else models.PoissonResidual(64, 4)
    data = points, torch.zeros(len(points), 1)
    return Problem(model, nn.MSELoss(), [data], joint=False)


ALL = ("mc", "empirical", "type-2", STEP)
NOT_TYPE_2 = ("mc", "empirical", STEP)
LARGE = ("mc", STEP)

PROBLEMS: dict[str, Spec] = {
    "mlp": Spec("MLP 784-1024-512-256-128-64-10, N = 512, CE", ALL, _mlp, 15),
    "resnet": Spec(
        "ResNet, 32x32, widths 32-64-128, batch norm in eval mode, N = 64, CE", ALL, _resnet, 9
    ),
    "gpt": Spec("GPT, 4 layers, d = 192, T = 128, N = 8, vocabulary 65, CE", NOT_TYPE_2, _gpt, 9),
    "resnet50": Spec("ResNet-50 shape, 64x64, N = 16, 1,000 classes, CE", LARGE, _resnet50, 5),
    "gpt2": Spec(
        "GPT-2 shape, 12 layers, d = 256, T = 256, N = 4, vocabulary 5,000, CE",
        LARGE,
        _gpt2,
        5,
    ),
    "pinn": Spec("Poisson residual, tanh net 4x64, 1,000 points, MSE", ALL, _poisson, 15),
    "batches": Spec(
        "1,000 batches of 32 through the MLP, in one call, CE",
        ("mc",),
        _mini_batches,
        3,
        (),
    ),
}
