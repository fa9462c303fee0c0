"""How long calls take beside one another, the memory they need, and who else is busy."""

from fxkfac.measure.elsewhere import Elsewhere, warning
from fxkfac.measure.memory import MB, Peak, later_peak
from fxkfac.measure.timing import Ratio, interleaved, seconds_of, synchronize

__all__ = [
    "MB",
    "Elsewhere",
    "Peak",
    "Ratio",
    "interleaved",
    "later_peak",
    "seconds_of",
    "synchronize",
    "warning",
]
