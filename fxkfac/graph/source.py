"""Where in the user's own code a node comes from."""

from __future__ import annotations

import linecache
import re
import sysconfig
from functools import cache
from types import FrameType

from torch.fx import Node

from fxkfac.graph.uses.ir import Source
from fxkfac.reached import is_foreign

STANDARD, PACKAGES = sysconfig.get_path("stdlib"), ("site-packages", "dist-packages")
FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>\S+)\n?(?P<code>.*)')


def is_users(file: str) -> bool:
    """Whether a file is the user's own, or a package of theirs: not Python's library either."""
    of_python = file.startswith(STANDARD) and not any(name in file for name in PACKAGES)
    return not is_foreign(file) and not of_python


def caller(frame: FrameType | None) -> Source | None:
    """The innermost line of the user's own code that runs now, from this frame on."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Source(file, line, frame.f_code.co_name, linecache.getline(file, line).strip())


@cache
def _frames(trace: str) -> tuple[Source, ...]:
    found = [m.groupdict() for m in FRAME.finditer(trace)]
    return tuple(
        Source(f["file"], int(f["line"]), f["function"], f["code"].strip())
        for f in found
        if is_users(f["file"])
    )


def source_of(node: Node) -> Source | None:
    """The innermost line of the user's own code that led to this node."""
    frames = _frames(node.meta.get("stack_trace") or "")
    return frames[-1] if frames else None


def module_of(node: Node) -> str:
    """Path of the innermost module that ran this node, such as `encoder.0.linear1`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(value[0]) for value in stack.values()]
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""
