"""Tracing and trial runs draw no numbers of the caller's, and print nothing of their own."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

import torch
from torch._C import _functorch as functorch
from torch.distributions import Distribution

from fxkfac.isolation import own_randomness
from fxkfac.reached import is_foreign


class _UsersOwn:
    """The standard error, without what torch prints there, such as the graph of a failed export."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if is_foreign(sys._getframe(1).f_code.co_filename):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quietly() -> Iterator[None]:
    """Tracing and trial runs draw random numbers and speak of their own doings; nobody else's."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    validated = Distribution._validate_args  # which the first export switches off for everyone
    try:
        with (
            own_randomness(0),
            _others_randomness(),
            warnings.catch_warnings(),
            _transforms_closed(),
        ):
            warnings.simplefilter("ignore")
            with torch.enable_grad(), redirect_stderr(_UsersOwn(sys.stderr)):
                yield
    finally:
        logging.disable(disabled)
        Distribution.set_default_validate_args(validated)


def others_states() -> dict[str, Any]:
    """The states of the generators of Python's and numpy's own."""
    states: dict[str, Any] = {"random": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy.random"] = numpy.random.get_state()
    return states


@contextmanager
def _others_randomness() -> Iterator[None]:
    """Give these states back as they were."""
    states = others_states()
    try:
        yield
    finally:
        random.setstate(states["random"])
        if "numpy.random" in states:
            sys.modules["numpy"].random.set_state(states["numpy.random"])


@contextmanager
def _transforms_closed() -> Iterator[None]:
    """A front end that fails inside `jvp` or `grad` leaves these open: close them again."""
    depth, closed = functorch.get_dynamic_layer_stack_depth(), _forward_mode_closed()
    try:
        yield
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        if closed and not _forward_mode_closed():
            torch._C._exit_dual_level(0)


@contextmanager
def dispatch_kept() -> Iterator[None]:
    """Give back the thread's dispatch keys: a front end that fails inside `vmap` leaves some out.

    Then nothing gets a gradient any more. What has failed must be caught and let go inside, as the
    frames of its traceback hold guards that change the keys when they are freed.
    """
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*keys):
        yield


def _forward_mode_closed() -> bool:
    """Whether no forward-mode level is open, below Python's own count of them."""
    try:
        torch._C._exit_dual_level(torch._C._enter_dual_level())
    except RuntimeError:
        return False
    return True
