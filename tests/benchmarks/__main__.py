"""`python -m benchmarks`, in tests/: measure, print the table, save it with JSON and picture."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.peers import PEERS
from benchmarks.problems import ALL, PROBLEMS
from benchmarks.report import save
from benchmarks.suite import Row, Settings, run

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--flavours", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--libraries", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, help="at most; default: each problem's own")
    parser.add_argument("--budget", type=float, default=30, help="seconds per problem and flavour")
    parser.add_argument("--threads", type=int, help="default: 2, or 1 with --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="no fresh processes")
    parser.add_argument("--quick", action="store_true", help="every problem at its tiny size")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the files go")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and report."""
    a = parse(words)
    threads = a.threads or (1 if a.quick else 2)
    torch.set_num_threads(threads)
    settings = Settings(
        tuple(a.problems),
        tuple(a.flavours),
        tuple(a.libraries),
        repeats=2 if a.quick and a.repeats is None else a.repeats,
        budget=a.budget,
        tiny=a.quick,
        memory=not a.no_memory,
        device=a.device,
        threads=threads,
    )
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    text = "nothing to measure"
    for part in run(settings, say):  # what is there is written, whatever stops the rest
        rows += part
        text = save(rows, settings, a.out)
    print(text)
    say(f"wrote {a.out}")


if __name__ == "__main__":
    main()
