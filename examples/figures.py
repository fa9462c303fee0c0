"""The figures of *KFAC from scratch*, and how far approximations are from the layers of a CNN.

The paper's Figures 4 to 10, drawn anew with this library alone; the net of Figures 5 to 10 is its
ReLU net with layers 5-4-4-3, square loss and 100 synthetic data, drawn from a seed of our own:

    rosenbrock.svg      Figure 4: the Rosenbrock function and its convex approximation
    hessian.svg         Figure 5: the Hessian and its block diagonal, in both orders
    ggn.svg             Figure 6: the same of the GGN
    monte-carlo.svg     Figure 7: the sampled Fisher comes near to the exact one
    fishers.svg         Figure 8: Fishers by few and many samples, exact, and empirical
    kfac-cvec.svg       Figure 9: three exact matrices and KFAC of each, in column-major order
    kfac-rvec.svg       Figure 10: the same in row-major order
    report.svg          condition numbers, traces, memory and spectra of a small CNN for digits
    layer-errors.svg    how far KFAC, EKFAC, KFOC and the exact diagonal are from its exact blocks

Run it with `python examples/figures.py [--out DIRECTORY]`; it takes some seconds.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxkfac
from fxkfac import exact, plots

ALPHA, ANCHOR = 10.0, (0.3, 1.0)  # of the Rosenbrock function, and where it is linearised
SIZES, N = (5, 4, 4, 3), 100
SAMPLES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
DIGITS = 150  # exact blocks take one backward pass for each of their logits
Data = tuple[Tensor, Tensor]


def residuals(x: Tensor) -> Tensor:
    """h(x) = (1 − x₁, √α (x₂ − x₁²)); the Rosenbrock function is hᵀ h."""
    return torch.stack([1 - x[0], ALPHA**0.5 * (x[1] - x[0] ** 2)])


def rosenbrock(path: Path, points: int = 160) -> None:
    """Figure 4: contour lines of hᵀ h, and of the same with h linearised at the anchor."""
    anchor = torch.tensor(ANCHOR, dtype=torch.float64)
    linear = exact.linearize(residuals, anchor)
    x = torch.linspace(-1.7, 1.7, points, dtype=torch.float64)
    y = torch.linspace(-0.7, 2.7, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1).T
    values = [torch.vmap(lambda at, h=h: h(at).square().sum())(grid) for h in (residuals, linear)]
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    ax = figure.add_subplot()
    looks = (("solid", "#0072B2", "f"), ("dashed", "#D55E00", "convex approximation"))
    levels = sorted(
        (0.5, 2, 20, 40, float(residuals(anchor).square().sum()))
    )  # both touch at the anchor
    for value, (line, colour, name) in zip(values, looks, strict=True):
        z = value.reshape(points, points)
        ax.contour(x, y, z, levels=levels, linestyles=line, colors=colour, linewidths=1.1)
        ax.plot([], [], linestyle=line, color=colour, label=name)
    ax.plot(*ANCHOR, "*", color="#222222", markersize=13, linestyle="none", label="anchor")
    ax.plot(1, 1, "x", color="#222222", linestyle="none", label="minimum of f")
    ax.set(xlabel="$x_1$", ylabel="$x_2$", title="Rosenbrock function, α = 10")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    save(figure, path)


def synthetic() -> tuple[nn.Module, Data]:
    """The net and the data of Figures 5 to 10, in float64."""
    torch.manual_seed(7)  # every unit is on for some data and off for others
    layers = [m for a, b in pairwise(SIZES) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).double()
    return model, (torch.randn(N, SIZES[0]).double(), torch.randn(N, SIZES[-1]).double())


def block_diagonal(matrix: Tensor, sizes: list[int]) -> Tensor:
    """Zeros but in the blocks along the diagonal."""
    return matrix * torch.block_diag(*(torch.ones(n, n, dtype=matrix.dtype) for n in sizes))


def both_orders(matrix, title: str, sizes: list[int], path: Path) -> None:
    """Figures 5 and 6: a matrix and its block diagonal; cvec on the left, rvec on the right."""
    figure = Figure(figsize=(7.4, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, vec in zip(axes.T, ("cvec", "rvec"), strict=True):
        whole = matrix(vec)
        largest = whole.abs().max().item()
        plots.heatmap(whole, sizes, column[0], largest).set_title(f"{title}, {vec}")
        plots.heatmap(block_diagonal(whole, sizes), sizes, column[1], largest)
        column[1].set_title(f"block diagonal, {vec}")
    with_scale(figure, axes.ravel())
    save(figure, path)


def with_scale(figure: Figure, axes: list[Axes]) -> None:
    """One colour bar for axes that have one scale."""
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), shrink=0.6, aspect=30)
    bar.set_label("absolute value")
    bar.outline.set_visible(False)


def monte_carlo(model: nn.Module, data: Data, samples: tuple[int, ...], path: Path) -> None:
    """Figure 7: spectral norm of sampled minus exact type-1 Fisher, over the number of samples."""
    loss, distances = nn.MSELoss(), []
    expected = exact.type1_fisher(model, loss, data)
    for M in samples:
        generator = torch.Generator().manual_seed(M)
        drawn = exact.mc_fisher(model, loss, data, mc_samples=M, generator=generator)
        distances.append(torch.linalg.matrix_norm(drawn - expected, 2).item())
    ax = plots.convergence(samples, distances)
    ax.set_title("The sampled Fisher comes near to the exact one")
    ax.set_ylabel("spectral norm of the residual")
    save(ax.figure, path)


def fishers(model: nn.Module, data: Data, sizes: list[int], path: Path) -> None:
    """Figure 8: sampled, exact and empirical Fishers; cvec above, rvec below."""
    loss = nn.MSELoss()
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(2, 4)
    for row, vec in zip(axes, ("cvec", "rvec"), strict=True):
        found = {
            f"{M} sample{'s' * (M > 1)}": exact.mc_fisher(model, loss, data, None, None, vec, M)
            for M in (1, 100)
        }
        found["exact (type-1, GGN)"] = exact.type1_fisher(model, loss, data, vec=vec)
        found["empirical"] = exact.empirical_fisher(model, loss, data, vec=vec)
        if vec == "cvec":
            largest = found["exact (type-1, GGN)"].abs().max().item()
        for ax, (name, matrix) in zip(row, found.items(), strict=True):
            plots.heatmap(matrix, sizes, ax, largest).set_title(f"{name}, {vec}")
    with_scale(figure, axes.ravel())
    save(figure, path)


def exact_and_kfac(model: nn.Module, data: Data, vec: str, path: Path) -> None:
    """Figures 9 and 10: exact matrices above, KFAC of each below, weight and bias joined."""
    loss = nn.MSELoss()
    program = fxkfac.trace(model, data[0])
    wholes = {
        "type-2": ("GGN", exact.ggn(model, loss, data)),
        "mc": ("Fisher, 100 samples", exact.mc_fisher(model, loss, data, mc_samples=100)),
        "empirical": ("empirical Fisher", exact.empirical_fisher(model, loss, data)),
    }
    largest = max(matrix.abs().max().item() for _, matrix in wholes.values())
    figure = Figure(figsize=(10.4, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, (fisher, (name, matrix)) in zip(axes.T, wholes.items(), strict=True):
        factors = fxkfac.kfac(program, loss, data, fisher=fisher, mc_samples=100)
        order, sizes = joined_order(factors, vec), [block.numel for block in factors.values()]
        plots.heatmap(matrix[order][:, order], sizes, column[0], largest).set_title(name)
        approximate = factors.dense()[order][:, order]
        plots.heatmap(approximate, sizes, column[1], largest).set_title(f"KFAC, {fisher}")
    figure.suptitle(f"Exact matrices and KFAC, {vec}")
    with_scale(figure, axes.ravel())
    save(figure, path)


def joined_order(factors: fxkfac.Factors, vec: str) -> Tensor:
    """Positions that bring W and b of every layer into the order of W̃ = (W b), which is vec's."""
    order, start = [], 0
    for block in factors.values():
        (term,) = block.terms
        joined = term.entries[0].T  # (out, in + 1), the numbers of the entries of W̃
        order.append(start + (exact.cvec if vec == "cvec" else exact.rvec)(joined))
        start += block.numel
    return torch.cat(order)


def digit_net(epochs: int = 5) -> tuple[nn.Module, Data]:
    """A small CNN trained on digits, in float64, and some of the digits."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images).unsqueeze(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10),
    ).double()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model, (x[:DIGITS], y[:DIGITS])


def overview(factors: fxkfac.Factors, name: str, path: Path) -> None:
    """Condition numbers, shares of the trace, memory, and the spectra of one block."""
    report = factors.report()
    print(report)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    plots.condition_numbers(report, axes[0, 0])
    plots.trace_shares(report, axes[0, 1])
    plots.memory(report, axes[1, 0])
    plots.spectra(factors[name], axes[1, 1])
    save(figure, path)


def layer_errors(
    program: fxkfac.Program, loss: nn.Module, data: Data, factors: fxkfac.Factors, path: Path
) -> None:
    """How far four approximations are from every layer's exact block of the GGN."""
    errors = fxkfac.layer_errors(program, loss, data, factors)
    print(errors)
    ax = plots.layer_errors(errors)
    ax.figure.suptitle("A small CNN on handwritten digits")
    save(ax.figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same picture."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=130, metadata={"Date": None})
    print(f"Wrote {path}")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rosenbrock(out / "rosenbrock.svg")
    (model, data), loss = synthetic(), nn.MSELoss()
    sizes = [p.numel() for p in model.parameters()]
    for name, matrix in (("Hessian", exact.hessian), ("GGN", exact.ggn)):
        path = out / f"{name.lower()}.svg"
        both_orders(lambda vec, m=matrix: m(model, loss, data, vec=vec), name, sizes, path)
    monte_carlo(model, data, SAMPLES, out / "monte-carlo.svg")
    fishers(model, data, sizes, out / "fishers.svg")
    for vec in ("cvec", "rvec"):
        exact_and_kfac(model, data, vec, out / f"kfac-{vec}.svg")
    (model, data), loss = digit_net(), nn.CrossEntropyLoss()
    program = fxkfac.trace(model, data[0])
    factors = fxkfac.kfac(program, loss, data)
    overview(factors, "7.weight", out / "report.svg")
    layer_errors(program, loss, data, factors, out / "layer-errors.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main(arguments.out)
