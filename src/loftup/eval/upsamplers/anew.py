"""Upsamplers that take the features anew from the picture: of shifted views, a larger one, or overlapping patches.

What they are given of the backbone is left aside, so that one table holds them beside upsamplers of its features, and
a probe on its features stays what it is. The features they take go to another upsampler, "bilinear" if none is named.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from ...backbones.views import VIEWS, offsets, shifted
from ...backbones.vit import PlainViT
from ...errors import LoftUpError
from ..features import extract
from .registry import Make, Upsampler, register

__all__ = ["Anew", "between", "diagonal", "enlarged", "overlapping"]

Look = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] to features (B, C, h, w) in float32


class Anew(nn.Module):
    """An upsampler of other features of the picture than those that it is given.

    Args:
        look: takes them.
        inner: the upsampler.

    Attributes:
        anew: True. It needs no features, only the picture.
    """

    anew = True

    def __init__(self, look: Look, inner: Upsampler) -> None:
        super().__init__()
        self.look = look
        self.inner = inner  # a network of which is moved and counted, and the backbone, inside look, is not
        self.eval()

    def forward(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The image (B, 3, H, W) in [0, 1] to (B, C, H', W') in the dtype of ``features``."""
        return self.inner(self._take(features, image), image, size)

    def _take(self, features: Tensor, image: Tensor) -> Tensor:
        return self.look(image).to(features.dtype)


class AnewInAStream(Anew):
    """The same around an upsampler that has ``at`` and takes ``head=``."""

    def forward(self, features: Tensor, image: Tensor, size: tuple[int, int], head: Any = None) -> Tensor:
        """As :class:`Anew`, with a pointwise head on the way, see :func:`loftup.eval.upsamplers.access.with_head`."""
        options = {} if head is None else {"head": head}
        return self.inner(self._take(features, image), image, size, **options)

    def at(self, features: Tensor, image: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, N, C) at points (B, N, 2), (column, row) of the ``size`` grid."""
        inner: Any = self.inner
        return inner.at(self._take(features, image), image, points, size)  # type: ignore[no-any-return]


def enlarged(backbone: Backbone, factor: float) -> Look:
    """Look at the picture enlarged by a factor, bicubically: the expensive way to finer features."""

    def look(image: Tensor) -> Tensor:
        size = tuple(round(factor * side) for side in image.shape[-2:])
        return extract(backbone, F.interpolate(image, size, mode="bicubic", align_corners=False).clamp(0, 1))

    return look


def overlapping(backbone: Backbone) -> Look:
    """Look once with the stride of the patch embedding halved: twice the cells each way, four times the tokens."""
    vit, patch = backbone.features, backbone.patch_size
    # Rotary embeddings count patches that do not overlap.
    if not isinstance(vit, PlainViT) or vit.layout.rope or isinstance(patch, tuple) or patch % 2:
        raise LoftUpError(
            "'overlapping' halves the stride of a plain vision transformer's patches, of an even number of pixels, of "
            f"one map and without rotary embeddings; got {backbone.name or type(backbone.model).__name__} with {patch}"
        )
    half = patch // 2
    first = -(-half // 2)  # so that a cell is centred where an upsampler expects it, to half a pixel

    def look(image: Tensor) -> Tensor:
        size = backbone.input_size(image.shape[2], image.shape[3])
        if size != tuple(image.shape[2:]):
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        image = F.pad(backbone.normalise(image), (first, half - first) * 2, mode="reflect")
        convolution = vit.convolution
        usual = convolution.stride
        convolution.stride = (half, half)
        try:
            with torch.no_grad():
                (features,) = vit(image)
        finally:
            convolution.stride = usual
        return features.float()

    return look


def diagonal(backbone: Backbone) -> Look:
    """Look at two views on the diagonal, half the cost of four; the cells between are means of their neighbours."""
    if isinstance(backbone.patch_size, tuple):
        raise LoftUpError(
            f"views:diagonal takes one map, the backbone gives several, of the layers {backbone.layer}; choose one"
        )

    def look(image: Tensor) -> Tensor:
        size = backbone.input_size(image.shape[2], image.shape[3])
        if size != tuple(image.shape[2:]):
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        first, second = (extract(backbone, shifted(image, move, move)) for move in offsets(backbone.patch_size, 2))
        return between(first, second)

    return look


def between(first: Tensor, second: Tensor) -> Tensor:
    """Put maps (B, C, h, w) into the even and the odd places of one (B, C, 2h, 2w), means of neighbours elsewhere."""
    batch, channels, h, w = first.shape
    finer = first.new_zeros(batch, channels, 2 * h, 2 * w)
    finer[:, :, ::2, ::2], finer[:, :, 1::2, 1::2] = first, second
    there = finer.new_zeros(1, 1, 2 * h, 2 * w)
    there[:, :, ::2, ::2] = there[:, :, 1::2, 1::2] = 1
    return finer + (1 - there) * _neighbours(finer) / _neighbours(there).clamp(min=1)


def _neighbours(x: Tensor) -> Tensor:
    """The sum of what is above, below, left and right, nothing being outside."""
    padded = F.pad(x, (1, 1, 1, 1))
    return padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]


def _around(look: Look, backbone: Backbone, spec: str, make: Make) -> Anew:
    """The wrapper that has what the inner upsampler has."""
    inner = make(spec or "bilinear", backbone)
    return (AnewInAStream if hasattr(inner, "at") else Anew)(look, inner)


@register("views", around=True)
def _views(backbone: Backbone, argument: str, make: Make) -> Upsampler:
    count, _, inner = argument.partition(":")
    if count == "diagonal":
        backbone = backbone.with_views(1)
        return _around(diagonal(backbone), backbone, inner, make)
    if count not in map(str, VIEWS):
        raise LoftUpError(
            f"the number of 'views' must be 1, 4, 9, 16 or 'diagonal', got {count!r}; write views:4, or with an "
            "upsampler of theirs views:4:loftup:any"
        )
    backbone = backbone.with_views(int(count))
    return _around(lambda image: extract(backbone, image), backbone, inner, make)


@register("large_input", around=True)
def _large_input(backbone: Backbone, argument: str, make: Make) -> Upsampler:
    text, _, inner = argument.partition(":")
    try:
        factor = float(text or 2)
    except ValueError:
        factor = math.nan
    if not 1 < factor < math.inf:
        raise LoftUpError(
            f"the factor of 'large_input' must be a number above 1, got {text!r}; write large_input:2, or with an "
            "upsampler of theirs large_input:1.5:loftup:any"
        )
    return _around(enlarged(backbone, factor), backbone, inner, make)


@register("overlapping", around=True)
def _overlapping(backbone: Backbone, argument: str, make: Make) -> Upsampler:
    backbone = backbone.with_views(1)
    return _around(overlapping(backbone), backbone, argument, make)
