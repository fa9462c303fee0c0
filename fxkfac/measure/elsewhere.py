"""How busy other processes keep the machine, for times taken beside them say little.

Two threads that meet at the end of every operation wait for each other: when one of them has to
wait for its core, calls of milliseconds take seconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
TOO_BUSY = 0.1  # cores


class Elsewhere:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.before = _of_others()

    def cores(self) -> float | None:
        """Cores that other processes kept busy since, on average; `None` where none can tell."""
        if self.before is None:
            return None
        seconds = time.perf_counter() - self.start
        return max(0.0, (_of_others() or 0) - self.before) / seconds


def warning(cores: float | None) -> str | None:
    """What is to be said of times taken beside that many busy cores, if anything."""
    if cores is None or cores <= TOO_BUSY:
        return None
    return f"Other processes kept {cores:.1f} cores busy meanwhile: these times say little."


def _of_others() -> float | None:
    """Core seconds of all but this process, from the fields user, nice, system, irq to steal."""
    if not STAT.exists():
        return None
    fields = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])  # without idle and iowait
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
