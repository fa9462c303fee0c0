"""The examples run, say what they did, and write what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert after < before
    table = dict(re.findall(r"^  ([\w-]+) +(?:GGN|empirical Fisher) +([\d.]+)$", done.stdout, re.M))
    # All labels of a categorical can be listed: the exact expectation is the type-2 Fisher.
    assert table["type-1"] == table["type-2"]
    assert float(table["type-2"]) < float(table["forward-only"])
    assert (tmp_path / "exact-and-kfac.png").read_bytes().startswith(b"\x89PNG")
    drawn = list(tmp_path.glob("digits.svg*"))
    assert drawn, "neither the drawing nor, without dot, its source"


def test_poisson(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "poisson.py"))
    torch.manual_seed(0)
    points, params = example["draw_points"](), example["initial"]()
    training = example["train_kfac"](params, points)
    kfac = [example["loss"](p, points).item() for p in islice(training, 6)]
    assert kfac == sorted(kfac, reverse=True)
    assert kfac[-1] < 0.8 * kfac[0]
    adam = example["train_adam"](params, points, 1e-2)
    first, *_, last = [example["loss"](p, points).item() for p in islice(adam, 6)]
    assert kfac[-1] < last < first == kfac[0]
    curve, steps = example["run"](adam, 0.0)
    assert steps == 1
    assert len(curve) == 2
    example["draw"]({"KFAC": curve, "Adam": curve}, tmp_path / "poisson.svg")
    assert "relative L2 error" in (tmp_path / "poisson.svg").read_text()


def test_training(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "training.py"), "--out", str(tmp_path)]
    command += ["--trials", "2", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("KFAC", "Adam"):
        trials = re.findall(rf"^  {name}  .* (\S+)$", done.stdout, re.M)
        (final,) = re.findall(rf"^{name} with .*: loss (\S+) after \d+ steps", done.stdout, re.M)
        assert len(trials) == 2
        assert float(final) == min(map(float, trials))  # the best trial once more
        assert float(final) < 2.3  # that of guessing
    assert "of which" in done.stdout or "does not reach" in done.stdout
    assert "loss over all training images" in (tmp_path / "training.svg").read_text()
