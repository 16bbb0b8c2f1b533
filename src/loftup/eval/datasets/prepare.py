"""Bringing pictures and their label maps to the size that a task works at."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fit", "in_proportion", "to_float"]


def to_float(image: Tensor) -> Tensor:
    """(3, H, W) uint8 to float32 in [0, 1]."""
    return image.float() / 255


def fit(image: Tensor, *maps: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """Scale a picture so that it covers a size, keeping its proportions, and cut out the centre.

    What has the right scale already is not resampled: only cut, bit for bit.

    Args:
        image: (3, H, W) uint8; resized bilinearly with antialiasing.
        maps: (H, W) or (K, H, W), any dtype; of each pixel the nearest one is taken.
        size: (height, width) of the result; None keeps the picture's own.

    Returns:
        The image as float32 in [0, 1] and the maps in their dtypes.
    """
    picture = to_float(image)
    if size is None:
        return (picture, *maps)
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    cover = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if cover != (height, width):
        picture = F.interpolate(picture[None], cover, mode="bilinear", align_corners=False, antialias=True)[0]
        picture = picture.clamp(0, 1)
        rows, columns = (_nearest(new, old) for new, old in zip(cover, (height, width), strict=True))
        maps = tuple(x[..., rows, :][..., columns] for x in maps)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    return (picture[window], *(x[window] for x in maps))


def in_proportion(image: Tensor, short: int, multiple: int) -> Tensor:
    """Scale a picture to a length of its shorter side, the longer one to the nearest multiple of a patch.

    Args:
        image: (3, H, W) uint8; resized bilinearly with antialiasing.
        short: pixels of the shorter side.
        multiple: pixels of a patch.

    Returns:
        (1, 3, H', W') float32 in [0, 1].
    """
    picture = to_float(image)[None]
    least = min(image.shape[-2:])
    size = [
        short if side == least else max(1, round(side * short / least / multiple)) * multiple
        for side in image.shape[-2:]
    ]
    if size != list(image.shape[-2:]):
        picture = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    return picture


def _nearest(new: int, old: int) -> Tensor:
    return ((torch.arange(new) + 0.5) * old / new).long().clamp(max=old - 1)
