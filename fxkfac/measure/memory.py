"""A call -> the most memory that it takes above what is held before it.

On the CPU that is the highest resident set of the process, on a GPU the highest allocated memory.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MB = 2**20
CALLS, SECONDS = 3, 3.0  # at most


class Peak:
    """The highest memory since `start`, above what was held then.

    Attributes:
        on_gpu: Whether the memory is that of a GPU.
        resets: Whether the highest memory so far can be forgotten, as it can on Linux; elsewhere
            only a process's first peak is known.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu, self.resets = device != "cpu", True

    def start(self) -> None:
        """Give freed memory back to the system and begin anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MB
            return
        _trim()
        self.resets = _reset_high_water()
        self.before = _resident() if self.resets else _high_water()

    def above(self) -> float:
        """In MB."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / MB - self.before
        return _high_water() - self.before


def later_peak(call: Callable[[], Any], peak: Peak) -> float | None:
    """The median in MB of up to three calls, after a first one; `None` where none can tell."""
    peaks: list[float] = []
    end = time.perf_counter() + SECONDS
    while not peaks or (len(peaks) < CALLS and time.perf_counter() < end):
        peak.start()
        call()
        peaks.append(peak.above())
    return statistics.median(peaks) if peak.on_gpu or peak.resets else None


def _trim() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_high_water() -> bool:
    """Linux forgets the highest resident set; elsewhere only a process's first peak is known."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def _high_water() -> float:
    """VmHWM, which is what `getrusage` calls ru_maxrss."""
    status = Path("/proc/self/status")
    if not status.exists():
        scale = MB if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
