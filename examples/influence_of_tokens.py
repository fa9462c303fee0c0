"""Which source code taught a small GPT to go on as it does, down to the character.

A character-level GPT learns from Python's standard library. For some other stretches of it, the
influence of every training stretch that is looked at, and of every character of these, says by how
much weight on predicting it would lower the loss. The picture shows the most helpful ones, each
character as dark as its label helps, or red where it harms.

A run took 18 s of one core's time. To go on with "pos_index = pos.__index__", it is "__iter__",
"__contains__" and "raise IndexError" that help most, by their underscores and by "ndex"; in a
sentence of a comment, other sentences of comments, most of all by the "h" after "t".

Run it with `python examples/influence_of_tokens.py [--out DIRECTORY]`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gpt
import matplotlib
import torch
from torch import Tensor, nn

import fxkfac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, STEPS, BATCH = 48, 300, 32
N_TRAIN, N_TEST, SHOWN = 192, 2, 3
DAMPING = 1e-3
LOSS = nn.CrossEntropyLoss()

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Result:
    """Stretches of text, and the scores (n_train, LENGTH, n_test)."""

    train: Data
    test: Data
    scores: Tensor


def trained(characters: Tensor, steps: int) -> nn.Module:
    """A GPT after so many steps of Adam."""
    torch.manual_seed(0)
    model = gpt.GPT(width=32, depth=2, heads=2, length=LENGTH)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x, y = gpt.windows(characters, torch.randint(len(characters) - LENGTH, (BATCH,)), LENGTH)
        adam.zero_grad()
        LOSS(model(x), y).backward()
        adam.step()
    return model


def run(n_train: int, n_test: int, steps: int) -> Result:
    """Train, and score every character of some training stretches."""
    characters = gpt.text(400_000)
    known, other = characters[:-50_000], characters[-50_000:]
    model = trained(known, steps)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randint(49_000, (n,), generator=generator) for n in (n_train, n_test)]
    train, test = (gpt.windows(c, s, LENGTH) for c, s in zip((known, other), starts, strict=True))
    program = fxkfac.trace(model, train[0][:8])
    factors = fxkfac.kfac(program, LOSS, train, fisher="mc")
    scores = fxkfac.token_influence(program, LOSS, factors, train, test, DAMPING)
    return Result(train, test, scores)


def report(result: Result) -> None:
    """The most helpful stretches of each test stretch."""
    by_sequence = result.scores.sum(1)
    for j in range(by_sequence.shape[1]):
        print(f"to go on with     {written(result.test[1][j])!r}")
        for i in by_sequence[:, j].argsort()[:SHOWN].tolist():
            best = int(result.scores[i, :, j].argmin())
            label = chr(int(result.train[1][i, best]))
            print(
                f"  {by_sequence[i, j]:>9.3f}  {written(result.train[1][i])!r}, "
                f"most of all {label!r} at {best}"
            )


def written(characters: Tensor) -> str:
    return "".join(map(chr, characters.tolist()))


def draw(result: Result, path: Path) -> None:
    """The labels of the most helpful stretches, coloured by their scores."""
    n_test = len(result.test[0])
    rows = n_test * (SHOWN + 2)
    figure, axis = plt.subplots(figsize=(11, 0.34 * rows + 0.6))
    axis.set(xlim=(0, LENGTH + 6), ylim=(rows, -0.6))
    axis.set_axis_off()
    axis.set_title("What helps to predict a stretch of code: blue helps, red harms", loc="left")
    for j in range(n_test):
        row = j * (SHOWN + 2)
        _line(axis, row, "test", result.test[1][j], None)
        total = result.scores[:, :, j].sum(1)
        for k, i in enumerate(total.argsort()[:SHOWN].tolist(), start=1):
            _line(axis, row + k, f"{total[i]:.2g}", result.train[1][i], result.scores[i, :, j])
    figure.savefig(path, metadata={"Software": None}, dpi=100, bbox_inches="tight")
    plt.close(figure)


def _line(axis: plt.Axes, row: int, name: str, labels: Tensor, scores: Tensor | None) -> None:
    axis.text(5.5, row, name, ha="right", va="center", fontsize=9, color="0.4")
    limit = 1.0 if scores is None else float(scores.abs().max())
    for t, label in enumerate(written(labels)):
        if scores is not None:
            value = float(scores[t]) / limit
            colour = ("#0b5fa5" if value < 0 else "#c2410c", min(1.0, abs(value)))
            axis.add_patch(plt.Rectangle((6 + t, row - 0.45), 1, 0.9, color=colour, linewidth=0))
        shown = {"\n": "¶", " ": "·"}.get(label, label)
        colour = "0.75" if label in " \n" else "black"
        axis.text(
            6.5 + t, row, shown, ha="center", va="center", family="monospace", color=colour,
            parse_math=False,
        )  # fmt: skip


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result = run(N_TRAIN, N_TEST, STEPS)
    report(result)
    draw(result, out / "influence-of-tokens.png")
    print(f"Wrote {out / 'influence-of-tokens.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    main(arguments.out)
