"""Rows that are the patches of an image: their sums come from the image, without any patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fxkfac.curvature.sharing import accurate_dtype
from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.form import BatchAxis, Form, Patches
from fxkfac.graph.ir import Use
from fxkfac.graph.normal import Input
from fxkfac.linalg import Windows, patch_sums

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Image:
    """An image and the windows whose contents are the rows of a use."""

    image: Float[Tensor, "batch channels *space"]
    windows: Windows


def input_image(use: Use, x: Input) -> Image | None:
    """The input of a convolution; `None` for an op whose rows are no patches, or other ones."""
    form = use.form
    if not isinstance(form.prepare, Patches) or form.scale != 1.0 or not isinstance(x, Tensor):
        return None
    return _image(form, x.unsqueeze(0), form.x, form.d_in, form.prepare, None)


def output_image(use: Use, g: Tensor) -> Image | None:
    """The same for gradients at the output, whose windows are those of a transposed convolution.

    They are several vectors', in the first axis, which are so many images.
    Those of a convolution have length one.
    """
    form, folded = use.form, use.form.folded
    if form.routes is not None:
        return None
    if folded is not None:
        return _image(form, g, form.y, form.d_out, folded.patches, folded.places)
    if isinstance(form.prepare, Patches):
        return _image(form, g, form.y, form.d_out, _single(len(form.prepare.kernel)), None)
    return None


def _single(d: int) -> Patches:
    return Patches((1,) * d, (1,) * d, ((0, 0),) * d, (1,) * d)


def image_sums(use: Use, x: Input) -> Float[Tensor, "group batch d_in"] | None:
    """Σ_s x of every datum, where the data are the images of a convolution."""
    found = input_image(use, x)
    if found is None or use.batch != BatchAxis("n", 1, 1):
        return None
    return patch_sums(found.image, found.windows).movedim(1, 0)


def _image(
    form: Form,
    t: Tensor,
    axes: str,
    columns: list[str],
    patches: Patches,
    places: tuple[int, ...] | None,
) -> Image | None:
    """Read the axes `n (g i) places kernel` behind the first one; `n` may be missing.

    The columns of the rows must be those of a patch: the channel, then the kernel's axes.
    """
    tokens, d = axis_tokens(axes), len(patches.kernel)
    if not columns:
        return None
    channel, *kernel = columns
    own = tokens[: len(tokens) - len(kernel)]
    leading, channels = own[: -d - 1], own[-d - 1 : len(own) - d]
    if leading not in ([], ["n"]) or channels != [f"(g {channel})"] or tokens[len(own) :] != kernel:
        return None
    windows = Windows(
        patches.kernel,
        patches.stride,
        patches.padding,
        patches.dilation,
        form.sizes["g"],
        places,
    )
    image = t.flatten(0, 1) if leading else t
    return Image(image.to(accurate_dtype(t)), windows)
