"""Quickstart: the curvature of a small convolutional net on scikit-learn's handwritten digits.

Trains the net for a few epochs, traces it, computes the Kronecker factors of every flavour over a
DataLoader, compares them with the exact matrices of a layer small enough to form, takes one damped
natural-gradient step, and draws the tapped graph and exact against KFAC: docs/pictures/digits.svg
and docs/pictures/exact-and-kfac.png are of such a run.

Run it with `make demo`, or `python examples/quickstart.py [--out DIRECTORY]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAVOURS = ("type-2", "type-1", "mc", "curvature-propagation", "empirical", "forward-only")


class DigitNet(nn.Module):
    """8×8 images of digits -> ten logits. One layer is no module, and is seen all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.W = nn.Parameter(torch.randn(32, 8) / 32**0.5)  # stored (in, out)
        self.b = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of shape (N, 10) for images of shape (N, 1, 8, 8)."""
        h = nn.functional.max_pool2d(self.conv1(image).relu_(), 2)
        h = nn.functional.max_pool2d(self.conv2(h).relu_(), 2)
        h = torch.tanh(h.flatten(1) @ self.W + self.b)
        return self.head(h)


def digits() -> TensorDataset:
    """1,797 images of shape (1, 8, 8) in [0, 1], with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(data.target))


def train(model: nn.Module, loss: nn.Module, loader: DataLoader, epochs: int) -> None:
    """A few epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
        print(f"  epoch {epoch + 1}: loss of the last batch {loss(model(images), labels):.3f}")
    optimizer.zero_grad()


def all_factors(
    program: fxkfac.Program, loss: nn.Module, loader: DataLoader
) -> dict[str, fxkfac.Factors]:
    """The factors of every flavour, in one pass over the loader each."""
    factors = {}
    for fisher in FLAVOURS:
        print(f"  {fisher}")
        generator = torch.Generator().manual_seed(0)
        factors[fisher] = fxkfac.kfac(
            program, loss, loader, fisher=fisher, generator=generator, progress=True
        )
    return factors


def compare(
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    factors: dict[str, fxkfac.Factors],
    names: list[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Print each flavour's distance from the exact matrices; return (exact, KFAC) of each."""
    ggn = fxkfac.exact.ggn(model, loss, data, names)
    fisher = fxkfac.exact.empirical_fisher(model, loss, data, names)
    exact = {name: fisher if name == "empirical" else ggn for name in factors}
    print(f"  {'flavour':<24}{'compared with':<20}relative error")
    for name, computed in factors.items():
        block = computed.dense(*names)
        error = (block - exact[name]).norm() / exact[name].norm()
        print(f"  {name:<24}{reference(name):<20}{error:.3f}")
    return {name: (exact[name], computed.dense(*names)) for name, computed in factors.items()}


def reference(fisher: str) -> str:
    """The exact matrix that a flavour approximates."""
    return "empirical Fisher" if fisher == "empirical" else "GGN"


def natural_gradient_step(
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    factors: fxkfac.Factors,
    damping: float,
) -> tuple[float, float]:
    """One step along d = (KFAC + damping · I)⁻¹ ∇L; the loss over all data before and after it.

    Its length minimises the quadratic model with the exact GGN along d, by one GGN-vector product
    (Martens & Grosse 2015, Section 6.4): KFAC has no curvature between layers, so a full step of
    all layers at once would be too long.
    """
    images, labels = data
    names, parameters = zip(*model.named_parameters(), strict=True)
    before = loss(model(images), labels)
    gradients = dict(zip(names, torch.autograd.grad(before, parameters), strict=True))
    step = factors.solve(gradients, damping)
    curved = fxkfac.exact.ggn_vector_product(model, loss, data, step)
    slope = sum((gradients[n] * step[n]).sum() for n in names)
    curvature = sum((step[n] * (curved[n] + damping * step[n])).sum() for n in names)
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            parameter -= slope / curvature * step[name]
        after = loss(model(images), labels)
    return before.item(), after.item()


def heat_maps(pairs: dict[str, tuple[Tensor, Tensor]], shape: tuple[int, int], path: Path) -> None:
    """Exact against KFAC of one weight, in both orders, as the paper's Figures 9 and 10."""
    chosen = ("type-2", "mc", "empirical")
    figure, axes = plt.subplots(len(chosen), 4, figsize=(11, 8.6), layout="constrained")
    for row, name in zip(axes, chosen, strict=True):
        exact, approximate = (m.double() for m in pairs[name])
        turned = cvec_order(shape)
        limit = exact.abs().quantile(0.99).item()
        for axis, matrix, title in zip(
            row,
            (exact, approximate, exact[turned][:, turned], approximate[turned][:, turned]),
            ("exact, rvec", "KFAC, rvec", "exact, cvec", "KFAC, cvec"),
            strict=True,
        ):
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(title=title, xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\nagainst the {reference(name)}", fontsize=11)
        figure.colorbar(image, ax=row, shrink=0.8)
    figure.suptitle("Curvature of head.weight (10×8): exact GGN and empirical Fisher, and KFAC")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cvec_order(shape: tuple[int, int]) -> Tensor:
    """Positions that bring rvec order into cvec order."""
    rows, columns = shape
    return fxkfac.exact.cvec(torch.arange(rows * columns).view(rows, columns))


def main(out: Path) -> None:
    """Everything above, in order."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    data = digits()
    loader = DataLoader(data, batch_size=128, shuffle=True)
    everything = (data.tensors[0], data.tensors[1])
    model, loss = DigitNet(), nn.CrossEntropyLoss()

    print(f"Training on {len(data)} digits, the last batch of {len(data) % 128}")
    train(model, loss, loader, epochs=8)

    print("\nTracing")
    program = fxkfac.trace(model, everything[0][:8])
    print(program)
    worst = max(fxkfac.check(program, loss, (everything[0][:64], everything[1][:64])).values())
    print(f"gradients put together from the taps: autograd's to a relative error of {worst:.0e}")

    print("\nKronecker factors, one pass over the data each")
    factors = all_factors(program, loss, loader)

    print("\nExact matrices of head.weight against KFAC")
    pairs = compare(model, loss, everything, factors, ["head.weight"])

    before, after = natural_gradient_step(model, loss, everything, factors["type-2"], damping=1e-2)
    print(f"\nOne natural-gradient step, damping 0.01: loss {before:.4f} -> {after:.4f}")

    drawing = program.draw(str(out / "digits.svg"))
    heat_maps(pairs, (10, 8), out / "exact-and-kfac.png")
    print(f"\nWrote {drawing} and {out / 'exact-and-kfac.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures go")
    main(parser.parse_args().out)
