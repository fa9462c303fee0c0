"""Model -> program: capture, match, tap, locate, verify. Knows no curvature.

`questions` answers what can be read off `program.to_networkx()`.
"""

from fxkfac.graph.questions import (
    Saved,
    longest_path,
    saved_by_freezing,
    sharing_inputs,
    taps_below,
)

__all__ = ["Saved", "longest_path", "saved_by_freezing", "sharing_inputs", "taps_below"]
