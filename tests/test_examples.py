"""The examples run, say what they did, and write what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
