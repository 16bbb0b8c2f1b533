"""Pictures of masks over their image."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["overlay"]


def overlay(image: Tensor, labels: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """Objects in their colours over an image.

    Args:
        image: (3, H, W) in [0, 1].
        labels: (H, W) int64; pixels of 0 and below show the image alone.
        colours: (R, G, B) in 0..255 of every label, 0 included.

    Returns:
        (3, H, W) in [0, 1].
    """
    painted = (torch.tensor(colours) / 255)[labels.clamp(min=0)].movedim(-1, 0)
    return torch.where(labels > 0, 0.4 * image + 0.6 * painted, image)
