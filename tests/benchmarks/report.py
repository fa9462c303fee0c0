"""The table in text and Markdown, the JSON, and the picture."""

from __future__ import annotations

import itertools
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.own import absent
from benchmarks.peers import PEERS
from benchmarks.problems import PROBLEMS, STEP
from benchmarks.suite import DIFFERS, REFUSED, Row, Settings
from fxkfac.measure import warning

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADER = ("problem", "flavour", "library", "time", "quartiles", "memory", "first call", "A ⊗ B off")
FLAVOURS = {STEP: "loss + gradient + mc in one pass"}
EXPLANATION = """\
time: seconds of the call over those of torch.autograd.grad of the same loss, parameters and batch,
measured interleaved in one process; median and quartiles. memory: peak resident set of a call in a
fresh process, where freed tensors go back to the system, above what is held before it, over that of
the gradient, and in brackets the same less the factors themselves; on a GPU what is allocated, in
the process that also takes the times. first call: seconds of capture and first factors in a fresh
process (on a GPU, in that one), compiling anew where something is compiled, and how many gradients
that is. A ⊗ B off: largest relative distance of a layer's factors to fxkfac's on a tiny size of the
problem; where labels are drawn, that of the mean of 100 draws to the type-2 factors. Who differs is
not timed; - is what the library does not do; why is in the JSON and in the Markdown."""
COLOURS = ("#0b5fa5", "#0891b2", "#57534e", "#c2410c", "#7e22ce", "#15803d", "#b45309", "#be185d")
MARKERS = "oXsD^v<P"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, as text."""
    name = PROBLEMS[row.problem].title, FLAVOURS.get(row.flavour, row.flavour)
    off = "-" if row.difference is None else f"{row.difference:.0e}"
    start = (*name, PEERS[row.library].title)
    if row.time is None:
        word = "differs" if row.status == DIFFERS else "-"
        return (*start, word, "", "", "", off)
    t = row.time
    first = f"{row.first.seconds:.2f} s ({row.first_ratio:.0f})" if row.first else ""
    memory = "" if row.memory is None else f"{row.memory:.2f} ({row.memory_beside_factors:.2f})"
    return (*start, f"{t.median:.2f}", f"{t.lower:.2f} to {t.upper:.2f}", memory, first, off)


def lines_of(rows: list[Row]) -> list[tuple[str, ...]]:
    """The table's lines: those who refused share one, the last of their problem and flavour."""
    lines = []
    for _, group in itertools.groupby(rows, lambda row: (row.problem, row.flavour)):
        members = list(group)
        lines += [cells(row) for row in members if row.status != REFUSED]
        refused = [row for row in members if row.status == REFUSED]
        if refused:
            names = ", ".join(PEERS[row.library].title for row in refused)
            lines.append((*cells(refused[0])[:2], f"- {names}", "", "", "", "", ""))
    return _without_repeats(lines)


def _without_repeats(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Problem and flavour stand where they change."""
    result, last = [], ("", "")
    for line in lines:
        problem = "" if line[0] == last[0] else line[0]
        flavour = "" if line[:2] == last else line[1]
        result.append((problem, flavour, *line[2:]))
        last = line[0], line[1]
    return result


def text(rows: list[Row]) -> str:
    """The table for a terminal, with the problem's name on a line of its own."""
    lines = [HEADER[1:]]
    for cell in lines_of(rows):
        lines += [(f"# {cell[0]}",)] if cell[0] else []
        lines.append(cell[1:])
    full = [line for line in lines if len(line) > 1 and not line[1].startswith("- ")]
    widths = [max(len(line[k]) for line in full) for k in range(len(HEADER) - 1)]
    return "\n".join(_padded(line, widths) for line in lines)


def _padded(line: tuple[str, ...], widths: list[int]) -> str:
    if len(line) == 1:
        return "\n" + line[0][2:]
    return "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """A page with the table, who refused what, and the machine."""
    lines = [HEADER, ("---",) * len(HEADER), *lines_of(rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    refused = "\n".join(
        f"- {PEERS[r.library].title}, {r.problem}, {r.flavour}: {r.reason}"
        for r in rows
        if r.reason
    )
    where = "" if about["device"] == "cpu" else ", on a GPU"
    title = f"# Time and memory beside the peers{where}"
    parts = [title, EXPLANATION, "![Ratios](benchmarks.svg)", table]
    parts += ["## Not timed", refused] if refused else []
    return "\n\n".join([*parts, "## Machine", machine_text(about)]) + "\n"


def machine_text(about: dict[str, Any]) -> str:
    """A line about the machine, one about the versions, and what is amiss."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = f"{about['processor']}, {about['cores']} cores, {about['threads']} threads"
    lines = [f"{where}, {about['device']}, {about['system']}.", f"{versions}."]
    if about["not_there"]:
        missing = ", ".join(f"{name} ({what})" for name, what in about["not_there"].items())
        lines.append(f"Not there in this fxkfac: {missing}.")
    said = warning(about["elsewhere"])
    return "\n".join([*lines, said] if said else lines)


def about(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """The machine and the versions, what is not there, and how busy others were at most."""
    installed = {p.distribution: p.version for p in PEERS.values() if p.distribution and p.version}
    device = torch.cuda.get_device_name() if settings.device != "cpu" else "cpu"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fxkfac": version("fxkfac"),
            **installed,
        },
        "not_there": absent(),
        "elsewhere": max((row.time.elsewhere or 0 for row in rows if row.time), default=0),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(row: Row) -> dict[str, Any]:
    ratios = {k: getattr(row, k) for k in ("memory", "memory_beside_factors", "first_ratio")}
    return asdict(row) | ratios


def as_json(rows: list[Row], settings: Settings, machine: dict[str, Any]) -> str:
    """Everything that was measured."""
    results = [_plain(row) for row in rows]
    whole = {"machine": machine, "settings": asdict(settings), "results": results}
    return json.dumps(whole, indent=1)


def draw(rows: list[Row], path: Path) -> None:
    """Time and memory over the gradient's, a line for each problem and flavour."""
    rows = [row for row in rows if row.time]
    labels = list(dict.fromkeys((row.problem, row.flavour) for row in rows))
    size = (11, 1.6 + 0.34 * max(len(labels), 3))
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=size, layout="constrained")
    for number, (name, peer) in enumerate(PEERS.items()):
        mine = [row for row in rows if row.library == name]
        style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none"}
        _dots(axes[0], labels, mine, [row.time.median for row in mine], peer.title, style)
        _spread(axes[0], labels, mine, COLOURS[number])
        _dots(axes[1], labels, mine, [row.memory for row in mine], peer.title, style)
    for axis, title in zip(axes, ("time", "peak memory"), strict=True):
        _decorate(axis, title)
    axes[0].set_yticks(range(len(labels)), [f"{p}, {f}" for p, f in labels])
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=-(-len(PEERS) // 2))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _dots(
    axis: Any, labels: list[Any], rows: list[Row], values: list[Any], title: str, style: Any
) -> None:
    known = [(value, row) for value, row in zip(values, rows, strict=True) if value is not None]
    if known:
        x, y = [value for value, _ in known], [_height(labels, row) for _, row in known]
        axis.plot(x, y, label=title, markersize=7, alpha=0.85, **style)


def _spread(axis: Any, labels: list[Any], rows: list[Row], colour: str) -> None:
    for row in rows:
        y = _height(labels, row)
        axis.plot([row.time.lower, row.time.upper], [y, y], color=colour, linewidth=2, alpha=0.5)


def _height(labels: list[Any], row: Row) -> int:
    return labels.index((row.problem, row.flavour))


def _decorate(axis: Any, title: str) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=1)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    low, high = axis.get_xlim()
    ticks = [t for t in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    axis.set_xticks(ticks)
    axis.set_xlabel(f"{title}, in gradients")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)


def save(rows: list[Row], settings: Settings, out: Path) -> str:
    """Write all files, and return what is printed."""
    out.mkdir(parents=True, exist_ok=True)
    machine = about(settings, rows)
    (out / "benchmarks.json").write_text(as_json(rows, settings, machine) + "\n")
    (out / "benchmarks.md").write_text(markdown(rows, machine))
    draw(rows, out / "benchmarks.svg")
    return "\n\n".join([text(rows), EXPLANATION, machine_text(machine)])
