"""Parts and means of dense maps and masks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...networks.layers import Box

__all__ = ["crop_border", "cut", "near_outlines", "pool_to", "project", "soft_overlap", "some", "widened"]


def cut(x: Tensor, box: Box | None) -> Tensor:
    """A box of (..., H, W); all of it for None."""
    return x if box is None else x[..., box[0] : box[2], box[1] : box[3]]


def crop_border(x: Tensor, fraction: float = 0.1) -> Tensor:
    """Cut ``fraction`` of the height and width off each side of (..., H, W), where upsamplers see half the picture.

    Rounded down to whole pixels. ValueError unless the fraction is in [0, 0.5).
    """
    if not 0 <= fraction < 0.5:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 0.5), cut off at both sides")
    rows, columns = (int(n * fraction) for n in x.shape[-2:])
    return x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]


def near_outlines(masks: Tensor) -> Tensor:
    """Tell of each pixel whether one of the masks (M, H, W) has its outline within two pixels: (H, W), in float32."""
    each = masks.float()[None]
    return (F.max_pool2d(each, 5, 1, 2) + F.max_pool2d(-each, 5, 1, 2)).amax(1)[0]


def pool_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average (B, C, H, W) over the cells of a coarser grid: (B, C, *grid).

    Where cells are not whole pixels, a pixel on the border of two counts in both. ValueError if the grid is finer.
    """
    if x.shape[-2] < grid[0] or x.shape[-1] < grid[1]:
        raise ValueError(f"cannot pool {tuple(x.shape[-2:])} to {grid}: the grid must not be finer than the map")
    return F.adaptive_avg_pool2d(x, grid)


def project(x: Tensor, directions: Tensor) -> Tensor:
    """Features (B, C, H, W) along directions (C, K): (B, K, H, W), in the dtype of the features also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("bchw,ck->bkhw", x, directions.to(x))


def soft_overlap(shares: Tensor, targets: Tensor) -> Tensor:
    """The mean over M masks of the soft intersection over union, of (M, N) and (M, N) in [0, 1].

    Each of the two areas is one pixel larger than it is, for masks that are hardly in sight.
    """
    both = (shares * targets).sum(1)
    either = (shares + targets).sum(1) - both
    return ((both + 1) / (either + 1)).mean()


def some(masks: Tensor, most: int) -> Tensor:
    """At most so many masks, evenly spaced: those of a picture are a random choice for the term that takes most."""
    if len(masks) <= most:
        return masks
    return masks[torch.arange(most, device=masks.device) * len(masks) // most]


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
