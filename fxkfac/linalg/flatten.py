"""Tensor -> vector, in the two orders of the paper (Definitions 1 and 2)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from fxkfac.ranges import require


def rvec(t: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Flatten the axes `start_dim..end_dim`, the last one varying fastest (row-major).

    For a matrix this puts its rows one after another: PyTorch's own order. Paper, Definition 2.

    Args:
        t: A tensor; a view of it is returned where there is one.
        start_dim, end_dim: The first and the last axis that is flattened.

    Raises:
        OptionError: The tensor has no such axes, or they come in another order.
    """
    return t.flatten(*_range(t, start_dim, end_dim))


def cvec(t: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Flatten the axes `start_dim..end_dim`, the first one varying fastest (column-major).

    For a matrix this puts its columns one after another: the literature's order. Paper,
    Definition 1.

    Args:
        t, start_dim, end_dim: As of `fxkfac.exact.rvec`.

    Raises:
        OptionError: As `fxkfac.exact.rvec` does.
    """
    start, end = _range(t, start_dim, end_dim)
    if t.ndim == 0:
        return t.flatten()
    axes = [f"a{i}" for i in range(t.ndim)]
    before, flat, after = axes[:start], axes[start : end + 1], axes[end + 1 :]
    turned = [*before, f"({' '.join(reversed(flat))})", *after]
    return rearrange(t, f"{' '.join(axes)} -> {' '.join(turned)}")


def _range(t: Tensor, start_dim: int, end_dim: int) -> tuple[int, int]:
    """Both axes, counted from zero up; a number counts as a vector of one."""
    ndim = max(t.ndim, 1)
    start, end = (axis + ndim if axis < 0 else axis for axis in (start_dim, end_dim))
    require(
        0 <= start <= end < ndim,
        f"start_dim={start_dim} and end_dim={end_dim} for a tensor of shape {tuple(t.shape)}; "
        "expected the first and the last one of the axes to be flattened.",
    )
    return start, end
