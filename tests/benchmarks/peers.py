"""The libraries behind one interface: `prepare(problem, flavour)` gives a call and its reading.

An adapter only calls the library's documented way to the factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks import adapters, own
from benchmarks.interface import Prepared, Refused
from benchmarks.problems import ALL, Problem

PLAIN = ("mc", "empirical", "type-2")


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        title: Its name in tables.
        flavours: Those that it has.
        adapter: From a problem, which it may change, and a flavour to the call.
        distribution: The name of its distribution, or `None`.
        module: What the adapter imports, so that this is not in the first call.
    """

    title: str
    flavours: tuple[str, ...]
    adapter: Callable[[Problem, str], Prepared]
    distribution: str | None = None
    module: str | None = None

    @property
    def version(self) -> str | None:
        """The installed version; `None` where there is none."""
        try:
            return version(self.distribution) if self.distribution else ""
        except PackageNotFoundError:
            return None

    def prepare(self, problem: Problem, flavour: str) -> Prepared:
        """Make everything that can be kept from call to call.

        Raises:
            Refused: The library is not installed, or does not have this flavour.
        """
        if self.version is None:
            raise Refused("not installed")
        if flavour not in self.flavours:
            raise Refused(f"has no flavour {flavour}")
        # Some mark the inputs as requiring gradients; all share the data.
        batches = [(x.detach(), y) for x, y in problem.batches]
        mine = replace(problem, model=deepcopy(problem.model), batches=batches)
        with silenced():
            prepared = self.adapter(mine, flavour)

        def quiet_call() -> Any:
            with silenced():
                return prepared.call()

        return prepared._replace(call=quiet_call)


@contextmanager
def silenced() -> Iterator[None]:
    """Without the libraries' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PEERS: dict[str, Peer] = {
    "fxkfac": Peer("fxkfac", ALL, own.fxkfac_factors, module="fxkfac.front"),
    own.INDUCTOR: Peer("fxkfac, inductor", ALL, own.inductor_factors, module="fxkfac.front"),
    "hooks": Peer("plain hooks", ALL, own.hooks_factors),
    "curvlinops": Peer(
        "curvlinops", PLAIN, adapters.curvlinops_factors, "curvlinops-for-pytorch", "curvlinops"
    ),
    "backpack": Peer(
        "BackPACK", ("mc", "type-2"), adapters.backpack_factors, "backpack-for-pytorch", "backpack"
    ),
    "nngeometry": Peer(
        "nngeometry", PLAIN, adapters.nngeometry_factors, "nngeometry", "nngeometry.metrics"
    ),
    "kronfluence": Peer(
        "kronfluence",
        ("mc", "empirical"),
        adapters.kronfluence_factors,
        "kronfluence",
        "kronfluence.analyzer",
    ),
    "asdl": Peer("ASDL", PLAIN, adapters.asdl_factors, "asdfghjkl", "asdl"),
}
