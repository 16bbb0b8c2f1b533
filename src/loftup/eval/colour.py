"""Pictures of images, label maps and maps of numbers."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pictures import require_pillow

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["label_picture", "map_picture", "overlay", "palette", "picture"]

GOLDEN = 0.618034
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark blue to yellow


def picture(image: Tensor) -> "Image.Image":
    """(3, H, W) float in [0, 1] as a picture."""
    array = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().numpy()
    return require_pillow().fromarray(array)  # type: ignore[no-any-return]


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """(R, G, B) in 0..255 of ``count`` labels, told apart by hue and lightness."""
    shades = (colorsys.hls_to_rgb(index * GOLDEN % 1, 0.35 + 0.15 * (index % 3), 0.7) for index in range(count))
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in shades)


def label_picture(labels: Tensor, colours: Sequence[tuple[int, int, int]]) -> "Image.Image":
    """(H, W) int64 as a picture in the labels' colours; -1 is black."""
    table = torch.tensor([*colours, (0, 0, 0)]) / 255
    return picture(table[labels.cpu()].movedim(-1, 0))


def map_picture(values: Tensor, low: float, high: float) -> "Image.Image":
    """(H, W) float as a picture from dark blue at ``low`` to yellow at ``high``; NaN is black."""
    ramp = torch.tensor(RAMP) / 255
    at = ((values.cpu().float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num() * (len(ramp) - 1)
    below = at.floor().long().clamp(max=len(ramp) - 2)
    share = (at - below)[..., None]
    colours = ramp[below] * (1 - share) + ramp[below + 1] * share
    return picture(colours.masked_fill(values.cpu().isnan()[..., None], 0).movedim(-1, 0))


def overlay(image: Tensor, labels: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """Objects in their colours over an image.

    Args:
        image: (3, H, W) in [0, 1].
        labels: (H, W) int64; pixels of 0 and below show the image alone.
        colours: (R, G, B) in 0..255 of every label, 0 included.

    Returns:
        (3, H, W) in [0, 1].
    """
    paint = (torch.tensor(colours) / 255)[labels.clamp(min=0)].movedim(-1, 0)
    return torch.where(labels > 0, 0.4 * image + 0.6 * paint, image)
