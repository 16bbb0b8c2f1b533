"""Upsampled features as tasks take them, never more of them at once than a task needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import Upsampler

__all__ = ["at_pixels", "with_head"]

DEARER = 16  # times what a pixel of a whole map costs, a point costs at most


def with_head(
    upsampler: Upsampler, features: Tensor, image: Tensor, size: tuple[int, int], head: Callable[[Tensor], Tensor]
) -> Tensor:
    """A pointwise head on upsampled features, in a stream where the upsampler can.

    Args:
        upsampler: any.
        features: (B, C, h, w).
        image: (B, 3, H, W) in [0, 1].
        size: (H', W') in pixels.
        head: maps (B, C, n, m) to (B, K, n, m), position by position.

    Returns:
        (B, K, H', W').
    """
    stream: Any = upsampler
    if hasattr(upsampler, "at"):
        return stream(features, image, size, head=head)  # type: ignore[no-any-return]
    return head(upsampler(features, image, size))


@torch.no_grad()
def at_pixels(upsampler: Upsampler, features: Tensor, image: Tensor, size: tuple[int, int], pixels: Tensor) -> Tensor:
    """Upsampled features at pixels alone.

    Args:
        upsampler: any; one with ``at`` makes nothing else where these are few.
        features: (B, C, h, w).
        image: (B, 3, H, W) in [0, 1].
        size: (H', W') in pixels.
        pixels: (B, N, 2) int64, (row, column) in the ``size`` grid.

    Returns:
        (B, N, C).
    """
    if hasattr(upsampler, "at") and DEARER * pixels.shape[1] < size[0] * size[1]:
        return upsampler.at(features, image, pixels.flip(-1), size)  # type: ignore[no-any-return]
    dense = upsampler(features, image, size)
    rows, columns = pixels.unbind(-1)
    return torch.stack([each[:, r, c].mT for each, r, c in zip(dense, rows, columns, strict=True)])
