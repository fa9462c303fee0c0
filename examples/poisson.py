"""A physics-informed net, trained by KFAC and by Adam for equal wall time.

The Poisson equation −Δu = f on the unit square, with u = sin(πx) sin(πy) and u = 0 on the boundary.
The loss has two terms, the mean square of the residual Δu + f inside and that of u on the boundary,
and each is a program of its own. The curvature of either is a Kronecker product for each parameter;
that of the loss is a sum of two, inverted exactly without being formed. As the Laplacian is a
forward one, a weight meets the value, the slopes and the Laplacian in a single linear op.

A run on two busy cores printed, after 8 s of wall time each, with the tracing (about half of them)
on KFAC's clock; the picture, docs/pictures/poisson.svg, is of the same run:

    optimizer        steps  relative L2 error
    KFAC               106  3.1e-03
    Adam, rate 0.1    1670  3.8e-01
    Adam, rate 0.03   1418  8.1e-02
    Adam, rate 0.01   1135  8.5e-02
    Adam, rate 0.003   930  1.5e-01

The number of steps, and with it the error, depends on the machine and its load. Adam has a constant
learning rate, and both use all points in every step.

Run it with `python examples/poisson.py [--out DIRECTORY] [--seconds OF_EACH_RUN]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from math import pi
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.func import jvp

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
WIDTHS = (2, 32, 32, 1)
INTERIOR, BOUNDARY = 900, 120  # points, drawn once; every step uses all of them
SECONDS = 8.0  # of wall time for each run, tracing included
DAMPING = 1e-5
STEP_SIZES = [2.0**-k for k in range(12)]
LEARNING_RATES = (1e-1, 3e-2, 1e-2, 3e-3)  # of Adam; each gets the full time, the best is drawn
CHECKS = 100  # how often the error is measured in a run, off the clock
COLOURS = {"KFAC": "#0b5fa5", "Adam": "#c2410c"}

Params = dict[str, Tensor]
Points = tuple[Tensor, Tensor]  # inside, and on the boundary
Curve = list[tuple[float, float]]  # (seconds, relative L2 error)


def solution(points: Tensor) -> Tensor:
    return torch.sin(pi * points).prod(1, keepdim=True)


def f(points: Tensor) -> Tensor:
    return 2 * pi**2 * solution(points)


def net(params: Params, points: Tensor) -> Tensor:
    h = torch.tanh(nn.functional.linear(points, params["W1"], params["b1"]))
    h = torch.tanh(nn.functional.linear(h, params["W2"], params["b2"]))
    return nn.functional.linear(h, params["W3"], params["b3"])


def residual(params: Params, points: Tensor) -> Tensor:
    return fxkfac.laplacian(lambda z: net(params, z), points).laplacian + f(points)


def initial() -> Params:
    params = {}
    for k in range(1, len(WIDTHS)):
        layer = nn.Linear(WIDTHS[k - 1], WIDTHS[k], dtype=torch.float64)
        params |= {f"W{k}": layer.weight.detach(), f"b{k}": layer.bias.detach()}
    return params


def draw_points() -> Points:
    """Uniform in the square, and uniform on its four sides in turn."""
    boundary, row = torch.rand(BOUNDARY, 2, dtype=torch.float64), torch.arange(BOUNDARY)
    boundary[row, row % 2] = (row // 2 % 2).double()
    return torch.rand(INTERIOR, 2, dtype=torch.float64), boundary


def all_residuals(params: Params, points: Points) -> Tensor:
    """A vector whose squared length is the loss."""
    terms = residual(params, points[0]), net(params, points[1])
    return torch.cat([term / len(term) ** 0.5 for term in terms]).squeeze(1)


def loss(params: Params, points: Points) -> Tensor:
    return all_residuals(params, points).square().sum()


def gradients(params: Params, points: Points) -> Params:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    value = loss(leaves, points)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def train_kfac(params: Params, points: Points) -> Iterator[Params]:
    """Trace, then yield the parameters before and after each step."""
    interior, boundary = points
    programs = fxkfac.trace(residual, interior, params), fxkfac.trace(net, boundary, params)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    while True:
        yield params
        natural = curvature(programs, params, points).solve(
            gradients(params, points), damping=DAMPING, damp="factors"
        )
        momentum = step_length(params, points, natural, momentum)
        params = {name: tensor + momentum[name] for name, tensor in params.items()}


def curvature(
    programs: tuple[fxkfac.Program, fxkfac.Program], params: Params, points: Points
) -> fxkfac.Total:
    """The factors of both terms of the loss, block by block.

    Biases have blocks of their own: inside, a bias meets the value alone and a weight all streams,
    so that the two are no single matrix (W b).
    """
    parts = []
    for program, where in zip(programs, points, strict=True):
        data = where, where.new_zeros(len(where), 1)
        parts.append(
            fxkfac.kfac(
                program,
                nn.MSELoss(),
                data,
                params,
                fisher="type-2",
                separate_weight_and_bias=True,
            )
        )
    return fxkfac.sum_of(*parts)


def step_length(params: Params, points: Points, natural: Params, momentum: Params) -> Params:
    """The step: the natural gradient and the last step, combined as the exact GGN has it.

    The two coefficients minimise the linearised residuals, a problem of two unknowns (Martens &
    Grosse 2015, Section 7); then the whole step is halved until the loss falls.
    """
    at = all_residuals(params, points)
    directions = natural, momentum
    slopes = [jvp(lambda p: all_residuals(p, points), (params,), (d,))[1] for d in directions]
    a, b = _least_squares(torch.stack(slopes, 1), at, _gram(directions))
    step = {name: a * natural[name] + b * momentum[name] for name in params}
    for size in STEP_SIZES:
        shorter = {name: size * tensor for name, tensor in step.items()}
        if loss({n: p + shorter[n] for n, p in params.items()}, points) < at.square().sum():
            return shorter
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def _gram(directions: tuple[Params, Params]) -> Tensor:
    flat = [torch.cat([d[name].flatten() for name in d]) for d in directions]
    return torch.stack([torch.stack([u @ v for v in flat]) for u in flat])


def _least_squares(J: Tensor, at: Tensor, gram: Tensor) -> Tensor:
    """The coefficients that minimise the damped quadratic model; the pseudo-inverse at first."""
    return -torch.linalg.pinv(J.mT @ J + DAMPING / 2 * gram, hermitian=True) @ (J.mT @ at)


def train_adam(params: Params, points: Points, learning_rate: float) -> Iterator[Params]:
    """Yield the parameters before and after each step."""
    params = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=learning_rate)
    while True:
        yield params
        optimizer.zero_grad()
        loss(params, points).backward()
        optimizer.step()


def run(training: Iterator[Params], seconds: float) -> tuple[Curve, int]:
    """Train for that long; the error over time, at the end too, and the number of steps."""
    axis = torch.linspace(0, 1, 50, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    spent, steps, curve = 0.0, -1, []
    while spent < seconds or steps < 1:
        start = time.perf_counter()
        params = next(training)
        spent, steps = spent + time.perf_counter() - start, steps + 1
        if spent >= seconds or not curve or spent - curve[-1][0] > seconds / CHECKS:
            with torch.no_grad():
                error = (net(params, grid) - solution(grid)).norm() / solution(grid).norm()
            curve.append((spent, error.item()))
    return curve, steps


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Error over wall time, each curve with its name at its end."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        colour = COLOURS[name[:4]]
        axis.plot(*zip(*curve, strict=True), color=colour, linewidth=2)
        axis.annotate(
            f"{name}\n{curve[-1][1]:.1e}",
            curve[-1],
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    axis.annotate(
        "two programs traced",
        curves["KFAC"][0],
        xytext=(-6, 0),
        textcoords="offset points",
        color=COLOURS["KFAC"],
        ha="right",
        va="center",
    )
    axis.set(
        yscale="log",
        xlabel="wall time in seconds, tracing included",
        ylabel="relative L2 error of u",
        title="Poisson equation, physics-informed net 2-32-32-1",
    )
    axis.set_xlim(0, max(curve[-1][0] for curve in curves.values()))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(out: Path, seconds: float) -> None:
    """Train in all ways from the same start, print the errors, and draw the best of each."""
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    points, params = draw_points(), initial()
    print(f"{seconds:g} s of wall time for each run")
    print(f"  {'optimizer':<16}{'steps':>6}  relative L2 error")
    trainings = {"KFAC": train_kfac(params, points)}
    trainings |= {
        f"Adam, rate {rate:g}": train_adam(params, points, rate) for rate in LEARNING_RATES
    }
    curves = {}
    for name, training in trainings.items():
        curves[name], steps = run(training, seconds)
        print(f"  {name:<16}{steps:>6}  {curves[name][-1][1]:.1e}")
    best = min(list(curves)[1:], key=lambda name: curves[name][-1][1])
    draw({"KFAC": curves["KFAC"], best: curves[best]}, out / "poisson.svg")
    print(f"Wrote {out / 'poisson.svg'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of wall time for each run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main(arguments.out, arguments.seconds)
