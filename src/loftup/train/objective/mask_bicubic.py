"""Stage 1: squared distance to bicubic features refined by masks (paper section 3.2, Eq. 1 and 2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import MaskBicubicConfig
from ..data.views import Batch
from .maps import cut, some, widened

__all__ = ["mask_bicubic", "mask_bicubic_target", "mask_refine"]


def mask_bicubic(settings: MaskBicubicConfig, dense: Tensor, normalised: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of the output's window, and that of plain bicubic interpolation there."""
    with torch.no_grad():
        bicubic = F.interpolate(normalised, batch.guidance.shape[-2:], mode="bicubic", align_corners=False)
        masks = [some(of_picture, settings.masks) for of_picture in batch.masks]
        target = cut(mask_refine(bicubic, masks, settings.alpha, settings.masks), batch.window)
        baseline = F.mse_loss(cut(bicubic, batch.window), target)
    return F.mse_loss(dense, target), baseline


def mask_refine(features: Tensor, masks: Sequence[Tensor], alpha: float = 0.8, limit: int = 150) -> Tensor:
    """Pull the features inside every mask towards their mean (Eq. 1).

    Masks are applied one after another, each to what the ones before it have left: ``F[m] = alpha * mean(F[m]) +
    (1 - alpha) * F[m]``.

    Args:
        features: (B, C, H, W), any float dtype.
        masks: B tensors (M, H, W) bool, on the same device; M may be 0, which leaves the image's features as they are.
        alpha: weight of the mean, in [0, 1].
        limit: at most so many masks of an image are applied, the first ones.

    Returns:
        (B, C, H, W) in the dtype of ``features``, a new tensor; differentiable in them.

    Raises:
        ValueError: there are not B mask tensors of the features' size, alpha is outside [0, 1], or the limit negative.
    """
    batch, _, height, width = features.shape
    if len(masks) != batch or any(m.shape != (len(m), height, width) or m.dtype != torch.bool for m in masks):
        got = [(tuple(m.shape), m.dtype) for m in masks]
        raise ValueError(f"got masks {got}; expected {batch} bool tensors (M, {height}, {width}), one for each image")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a number in [0, 1]")
    if limit < 0:
        raise ValueError(f"limit is {limit}, expected a number of masks")
    refined = []
    for feature, mask in zip(rearrange(widened(features), "b c h w -> b (h w) c"), masks, strict=True):
        # In place, each mask at the cost of its own pixels; nothing that autograd keeps is overwritten.
        pixels = feature.clone(memory_format=torch.contiguous_format)
        members = mask[:limit].flatten(1)
        # All masks' pixels at once: on a GPU every question for a number of pixels waits.
        for inside in members.nonzero()[:, 1].split(members.sum(1).tolist()):
            if len(inside):
                vectors = pixels[inside]
                pixels.index_copy_(0, inside, torch.lerp(vectors, vectors.mean(0, keepdim=True), alpha))
        refined.append(pixels)
    return rearrange(torch.stack(refined), "b (h w) c -> b c h w", h=height).to(features.dtype)


def mask_bicubic_target(
    features: Tensor, masks: Sequence[Tensor], size: tuple[int, int], alpha: float = 0.8, limit: int = 150
) -> Tensor:
    """Target of stage 1: features upsampled bicubically and refined by masks (Eq. 1).

    Takes normalised features (B, C, h, w) and the rest as :func:`mask_refine`, with masks at ``size``, (H, W).
    """
    return mask_refine(F.interpolate(features, size, mode="bicubic", align_corners=False), masks, alpha, limit)
