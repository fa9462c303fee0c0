"""`fxkfac.kfac` and `fxkfac.step` of all ranks' data: each rank its own, then one sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fxkfac.curvature.data import Data
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.kfac import kfac as kfac_here
from fxkfac.curvature.options import require_program
from fxkfac.curvature.step import Step
from fxkfac.curvature.step import step as step_here
from fxkfac.distributed.reduce import reduced
from fxkfac.distributed.workers import Workers
from fxkfac.errors import NoDataError
from fxkfac.graph.program import Program
from fxkfac.isolation import seed_from


def kfac(
    program: Program,
    loss: Any,
    data: Data,
    *,
    generator: Generator | None = None,
    group: Any = None,
    **options: Any,
) -> Factors:
    """The factors of all ranks' data; every rank of the group calls it.

    Each rank runs `fxkfac.kfac` on its own data, which may differ in length, or be none. The
    parameters must be the same on all ranks; nothing checks their values.

    Args:
        program, loss: As of `fxkfac.kfac`, and the same on every rank.
        data: This rank's.
        generator: Source of this rank's labels and signs. Default: one that is seeded with the next
            number of the program's own generator, plus the rank's place in the group; so ranks
            draw independently, whether or not they were seeded alike, and the same start gives the
            same factors for the same number of ranks.
        group: A group of `torch.distributed`; all ranks by default.
        options: Further arguments of `fxkfac.kfac`, by name.

    Returns:
        What `fxkfac.distributed.all_reduce` returns.

    Raises:
        MergeError, NoDataError: As `fxkfac.distributed.all_reduce` does.
        RankError: Another rank has failed, and with what; or there is no process group.
        FxkfacError: As `fxkfac.kfac` does, on the rank that has failed.
    """
    found: Factors = _of_all(kfac_here, program, loss, data, generator, group, options)
    return found


def step(
    program: Program,
    loss: Any,
    data: Data,
    *,
    generator: Generator | None = None,
    group: Any = None,
    **options: Any,
) -> Step:
    """Loss, gradients and factors of all ranks' data; every rank of the group calls it.

    Args:
        program, loss, data, generator, group: As of `fxkfac.distributed.kfac`.
        options: Further arguments of `fxkfac.step`, by name.

    Returns:
        What `fxkfac.distributed.all_reduce` returns.

    Raises:
        MergeError, NoDataError, RankError, FxkfacError: As `fxkfac.distributed.kfac` does.
    """
    found: Step = _of_all(step_here, program, loss, data, generator, group, options)
    return found


def _of_all(
    function: Callable[..., Any],
    program: Program,
    loss: Any,
    data: Data,
    generator: Generator | None,
    group: Any,
    options: dict[str, Any],
) -> Any:
    workers = Workers.of(group)
    device, part = torch.device("cpu"), None
    try:
        require_program(program)
        device = next(iter(program.model.tensors.values())).device
        source = _own_generator(program, workers.place) if generator is None else generator
        part = function(program, loss, data, generator=source, **options)
    except NoDataError as error:
        part = error.part or error
    except Exception as error:  # raised again, when all ranks know of it
        part = error
    return reduced(workers, part, device)


def _own_generator(program: Program, place: int) -> Generator:
    return Generator().manual_seed(seed_from(program.generator) + place)
