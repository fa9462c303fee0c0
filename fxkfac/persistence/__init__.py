"""Factors, averages, accumulations that outlive the process: written as a whole, or not at all."""

from __future__ import annotations

from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.running import RunningAverage
from fxkfac.errors import OptionError
from fxkfac.persistence.accumulation import packed_accumulation, resume
from fxkfac.persistence.container import StrPath, write
from fxkfac.persistence.factors import load, packed_average, packed_factors

__all__ = ["load", "resume", "save"]


def save(what: Factors | RunningAverage | Accumulation, path: StrPath) -> None:
    """Write factors, a running average or an accumulation as it is now, into a safetensors file.

    The file takes the place of one that is there once it is written as a whole and on the disk:
    whatever stops this, power cuts included, leaves that one as it was. Neither model nor data are
    in it. A process that is killed while it writes leaves a hidden file beside it.

    Args:
        what: Factors or their running average, to be read by `fxkfac.load`, or an accumulation, by
            `fxkfac.resume`.
        path: Where to; an ending of `.safetensors` lets other programs know it.

    Raises:
        FileError: The file cannot be written.
        OptionError: It is something else, or an average before its first update.
    """
    if isinstance(what, Factors):
        write(path, *packed_factors(what))
    elif isinstance(what, RunningAverage):
        write(path, *packed_average(what))
    elif isinstance(what, Accumulation):
        write(path, *packed_accumulation(what))
    else:
        raise OptionError(
            f"{type(what).__name__} cannot be saved; expected Factors, as of fxkfac.kfac, a "
            "RunningAverage or an Accumulation."
        )
