"""Pictures of curvature, by Matplotlib: the extra `plots`.

Each function takes what is to be drawn and, if there is one, the axes to draw it on; it returns the
axes, whose figure is `ax.figure`. Nothing global is read or changed.

    fxkfac.plots.condition_numbers(factors.report()).figure.savefig("conditions.svg")
"""

from fxkfac.plots.layers import condition_numbers, layer_errors, memory, trace_shares
from fxkfac.plots.matrices import convergence, heatmap, spectra

__all__ = [
    "condition_numbers",
    "convergence",
    "heatmap",
    "layer_errors",
    "memory",
    "spectra",
    "trace_shares",
]
