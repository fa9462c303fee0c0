"""Rows that are the patches of an image: their sums come from the image, without any patch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from fxkfac.graph.axes import axis_tokens
from fxkfac.graph.form import Form, Patches
from fxkfac.graph.uses.ir import Use
from fxkfac.linalg import Windows, patch_sums
from fxkfac.precision import accurate

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Image:
    """An image and the windows whose contents are the rows of a use."""

    image: Float[Tensor, "batch channels *space"]
    windows: Windows

    @property
    def rows(self) -> int:
        """Number of the windows' places on all images."""
        return len(self.image) * prod(a.places for a in self.windows.along(self.image))


@dataclass(frozen=True)
class Images:
    """Where a use has rows that are patches of images: all but the images.

    Attributes:
        windows: On the images.
        joined: Whether a first axis is joined with that of the data, which is the second one.
    """

    windows: Windows
    joined: bool

    def of(self, t: Tensor) -> Image:
        """Images that are there, several in the first axis."""
        return Image(accurate(t.flatten(0, 1) if self.joined else t), self.windows)

    def of_one(self, t: Tensor) -> Image:
        """One that is there by itself."""
        return Image(accurate(t if self.joined else t.unsqueeze(0)), self.windows)


def input_images(use: Use) -> Images | None:
    """The input of a convolution; `None` for an op whose rows are no patches, or other ones."""
    form = use.form
    if not isinstance(form.prepare, Patches) or form.scale != 1.0 or form.routes is not None:
        return None
    return _images(form, form.x, form.d_in, form.prepare, None)


def output_images(use: Use) -> Images | None:
    """The same for gradients at the output, whose windows are those of a transposed convolution.

    They are several vectors', in the first axis, which are so many images.
    Those of a convolution have length one.
    """
    form, folded = use.form, use.form.folded
    if form.routes is not None:
        return None
    if folded is not None:
        return _images(form, form.y, form.d_out, folded.patches, folded.places)
    if isinstance(form.prepare, Patches):
        return _images(form, form.y, form.d_out, _single(len(form.prepare.kernel)), None)
    return None


def _single(d: int) -> Patches:
    return Patches((1,) * d, (1,) * d, ((0, 0),) * d, (1,) * d)


def image_sums(of: Image) -> Float[Tensor, "group batch d_in"]:
    """Σ_s x of every datum, where the data are the images."""
    return patch_sums(of.image, of.windows).movedim(1, 0)


def _images(
    form: Form, axes: str, columns: list[str], patches: Patches, places: tuple[int, ...] | None
) -> Images | None:
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
    return Images(windows, joined=bool(leading))
