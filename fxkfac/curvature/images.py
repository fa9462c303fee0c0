"""Rows that are the patches of an image: their sums come from the image, without any patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fxkfac.curvature.sharing import accurate_dtype
from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.form import BatchAxis, Form, Patches
from fxkfac.graph.ir import Use
from fxkfac.linalg import Windows

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Image:
    """An image and the windows whose contents are the rows of a use."""

    image: Float[Tensor, "batch channels *space"]
    windows: Windows


def input_image(use: Use, x: Tensor) -> Image | None:
    """The input of a convolution; `None` for an op whose rows are no patches, or other ones."""
    form = use.form
    if not isinstance(form.prepare, Patches) or form.scale != 1.0 or form.routes is not None:
        return None
    return _image(form, x, form.x, form.prepare, None)


def output_image(use: Use, g: Tensor) -> Image | None:
    """The same for a gradient at the output of a transposed convolution."""
    folded = use.form.folded
    if folded is None or use.form.routes is not None:
        return None
    return _image(use.form, g, use.form.y, folded.patches, folded.places)


def is_by_datum(use: Use, at: BatchAxis | None) -> bool:
    """Whether the data are the images."""
    return at == BatchAxis("n", 1, 1) and axis_tokens(use.form.y)[0] == "n"


def _image(
    form: Form, t: Tensor, axes: str, patches: Patches, places: tuple[int, ...] | None
) -> Image | None:
    """Read the axes `n (g i) places kernel`, of which `n` may be missing."""
    tokens, d = axis_tokens(axes), len(patches.kernel)
    leading, channels = tokens[: -2 * d - 1], tokens[-2 * d - 1]
    if leading not in ([], ["n"]) or channels not in ("(g i)", "(g o)"):
        return None
    windows = Windows(
        patches.kernel,
        patches.stride,
        patches.padding,
        patches.dilation,
        form.sizes["g"],
        places,
    )
    image = t if leading else t.unsqueeze(0)
    return Image(image.to(accurate_dtype(t)), windows)
