"""Upsampled features as tasks take them, never more of them at once than a task needs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Upsampler

__all__ = ["at_pixels", "at_points", "with_head"]

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


@torch.no_grad()
def at_points(upsampler: Upsampler, features: Tensor, image: Tensor, size: tuple[int, int], points: Tensor) -> Tensor:
    """Upsampled features at a few points that may lie between pixels.

    Args:
        upsampler: any; of one without ``at`` the map is sampled bilinearly, as ``at`` does.
        features: (1, C, h, w).
        image: (1, 3, H, W) in [0, 1].
        size: (H', W') in pixels.
        points: (N, 2) float, (x, y) in pixels of the ``size`` grid, centres at whole numbers, inside it.

    Returns:
        (N, C).
    """
    if hasattr(upsampler, "at"):
        return upsampler.at(features, image, points[None], size)[0]  # type: ignore[no-any-return]
    dense = upsampler(features, image, size)
    across = (2 * points + 1) / points.new_tensor([size[1], size[0]]) - 1
    grid = across[None, None].to(dense.dtype)
    return F.grid_sample(dense, grid, padding_mode="border", align_corners=False)[0, :, 0].mT
