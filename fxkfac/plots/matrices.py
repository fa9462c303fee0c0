"""Pictures of matrices: their spectra, their entries, and how samples come near to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxkfac.curvature.curvature import AnyBlock
from fxkfac.curvature.spectra import factors_of
from fxkfac.errors import NonFiniteError, OptionError
from fxkfac.linalg import operators
from fxkfac.plots.style import BLACK, BLUE, GREY, ORANGE, axes_or_new, plain, quiet

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

DECADES = 4  # below the largest entry, all is drawn alike
Line = str | tuple[int, tuple[int, ...]]  # its style: by name, or dashes
A_LINES: tuple[Line, ...] = ("--", (0, (8, 2)), (0, (2, 1)))  # of one term after the other
B_LINES: tuple[Line, ...] = ("-.", ":", (0, (6, 1, 1, 1, 1, 1)))
POINTS = 2000  # of a spectrum with more eigenvalues, so many are drawn


def spectra(block: AnyBlock, ax: Axes | None = None) -> Axes:
    """Eigenvalues of A, of B and of the block, each over the largest of its own, in falling order.

    The horizontal axis is the place among all of them, from 0 to 1. Zeros have no place on a
    logarithmic axis: the legend counts them. An exact block has one line, and so has EKFAC's.

    Args:
        block: `factors[name]`.
        ax: Where to draw.

    Raises:
        OptionError: The block has no entries, or is a sum too large to be written out.
        NonFiniteError: A factor holds NaN or Inf.
        FxkfacError: Matplotlib is not installed.
    """
    if not isinstance(block, AnyBlock):
        raise OptionError(
            f"block is of type {type(block).__name__}; expected one block, such as "
            "factors['0.weight']."
        )
    if not block.numel:
        raise OptionError(f"the block of {', '.join(block.params)} has no entries to draw.")
    ax = axes_or_new(ax)
    for label, operator, colour, line in _operators(block):
        λ = operators.eigenvalues(operator).detach().cpu().double().sort(descending=True).values
        left = λ[λ > 0]
        if zeros := len(λ) - len(left):
            label = f"{label} ({zeros:,} of {len(λ):,} are zero)"
        places = (torch.arange(len(left), device="cpu") + 0.5) / len(λ)
        shown = _some(len(left))
        heights = left[shown] / left[:1]
        ax.plot(
            places[shown].tolist(), heights.tolist(), ls=line, color=colour, label=label, lw=1.6
        )
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    ax.set_xlabel("place among the eigenvalues")
    ax.set_ylabel("eigenvalue over the largest")
    ax.set_title(plain(", ".join(block.params)), fontsize="medium")
    quiet(ax, "both")
    ax.legend(frameon=False)
    return ax


def _operators(block: AnyBlock) -> Iterator[tuple[str, operators.Operator, str, Line]]:
    """Name, operator, colour and line of all that has a spectrum."""
    factors = list(factors_of(block))
    for k, (label, operator) in enumerate(factors):  # A and B of one term after the other
        colour, lines = (BLUE, A_LINES) if label.startswith("A") else (ORANGE, B_LINES)
        yield label, operator, colour, lines[k // 2 % len(lines)]
    yield "A ⊗ B" if len(factors) == 2 else "block", block.operator, BLACK, "-"


def _some(number: int) -> Tensor:
    """Positions of at most `POINTS`, from the first to the last."""
    if number <= POINTS:
        return torch.arange(number, device="cpu")
    return torch.linspace(0, number - 1, POINTS, dtype=torch.float64, device="cpu").round().long()


def heatmap(
    matrix: Float[Tensor, "n n"],
    sizes: Sequence[int] = (),
    ax: Axes | None = None,
    largest: float | None = None,
) -> Axes:
    """The absolute values of a matrix on a logarithmic scale, four decades of it.

    Args:
        matrix: What `factors.dense()` or `fxkfac.exact.ggn` gives.
        sizes: Lengths of the blocks along the diagonal; white lines are drawn between them.
        ax: Where to draw.
        largest: Where the scale ends, so that several pictures have one; by default at the largest
            absolute value.

    Raises:
        OptionError: It is no square matrix, the sizes do not sum up to its rows, or `largest` is
            not positive.
        NonFiniteError: The matrix holds NaN or Inf.
        FxkfacError: Matplotlib is not installed.
    """
    values = _absolute(matrix, sizes)
    if largest is not None and not 0 < largest < float("inf"):
        raise OptionError(f"largest={largest}; expected a positive number.")
    top = largest or float(values.max() if values.numel() else 0) or 1.0
    ax = axes_or_new(ax, height=5.0)
    from matplotlib.colors import LogNorm

    norm = LogNorm(top * 10.0**-DECADES, top, clip=True)  # so that zeros are drawn like the lowest
    ax.imshow(values.numpy(), norm=norm, cmap="viridis", interpolation="nearest")
    for end in accumulate(sizes[:-1]):
        ax.axhline(end - 0.5, color="white", linewidth=0.9)
        ax.axvline(end - 0.5, color="white", linewidth=0.9)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def _absolute(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """|C| in float64 on the CPU."""
    if not isinstance(matrix, Tensor):
        raise OptionError(f"the matrix is of type {type(matrix).__name__}; expected a tensor.")
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise OptionError(f"the matrix has shape {shape}; expected a square one.")
    if not isinstance(sizes, Sequence):
        raise OptionError(
            f"sizes is {sizes!r:.80}; expected the numbers of entries of all blocks, in a list."
        )
    if sizes and sum(sizes) != shape[0]:
        raise OptionError(
            f"the blocks have {sum(sizes)} rows, and the matrix {shape[0]}; expected as many. "
            "Pass the number of entries of every block, in the order of the matrix."
        )
    values = matrix.detach().cpu().double().abs()
    if not bool(values.isfinite().all()):
        raise NonFiniteError("the matrix holds NaN or Inf; expected finite numbers.")
    return values


def convergence(samples: Sequence[int], distances: Sequence[float], ax: Axes | None = None) -> Axes:
    """Distances from the matrix that a Monte-Carlo estimate converges to, over numbers of samples.

    Both axes are logarithmic. A dotted line falls as 1/√M, from the mean logarithm of
    distance · √M. Paper, Figure 7.

    Args:
        samples: M, one or more.
        distances: For each of them, the distance in any norm, which must be positive.
        ax: Where to draw.

    Raises:
        OptionError: There are not as many of both, none, or one is not positive.
        FxkfacError: Matplotlib is not installed.
    """
    both = [*samples, *distances]
    if len(samples) != len(distances) or not both or not all(0 < b < float("inf") for b in both):
        raise OptionError(
            f"there are {len(samples)} numbers of samples and {len(distances)} distances, the "
            f"smallest {min(both, default=None)}; expected as many of both, all positive."
        )
    ax = axes_or_new(ax)
    M, d = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (samples, distances))
    level = (d * M.sqrt()).log().mean().exp()
    ends = torch.stack([M.min(), M.max()])
    line = (level / ends.sqrt()).tolist()
    ax.plot(M.tolist(), d.tolist(), "o-", color=BLUE, lw=1.4, markersize=4, label="residual")
    ax.plot(ends.tolist(), line, ":", color=GREY, lw=1.4, label="∝ 1/√M")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("samples M")
    ax.set_ylabel("distance")
    quiet(ax, "both")
    ax.legend(frameon=False)
    return ax
