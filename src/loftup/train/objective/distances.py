"""Training objectives, each a function of tensors (paper section 3.2, and those that users compare with).

Features here are normalised by the channel norm. Shapes: low-resolution ``features (B, C, h, w)``, dense maps
``(B, C, H, W)``, masks of one image ``(M, H, W)`` bool.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.check import DISTANCES

__all__ = [
    "affinity_loss",
    "crop_border",
    "distance",
    "mask_bicubic_target",
    "mask_refine",
    "membership_loss",
    "pool_to",
    "read_membership",
    "total_variation",
]


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
    for feature, mask in zip(_wide(features).flatten(2).mT, masks, strict=True):  # (H*W, C)
        # In place, each mask at the cost of its own pixels; nothing that autograd keeps is overwritten.
        pixels = feature.clone(memory_format=torch.contiguous_format)
        members = mask[:limit].flatten(1)
        # All masks' pixels at once: on a GPU every question for a number of pixels waits.
        for inside in members.nonzero()[:, 1].split(members.sum(1).tolist()):
            if len(inside):
                chosen = pixels[inside]
                pixels.index_copy_(0, inside, torch.lerp(chosen, chosen.mean(0, keepdim=True), alpha))
        refined.append(pixels)
    return torch.stack(refined).mT.reshape(features.shape).to(features.dtype)


def mask_bicubic_target(
    features: Tensor, masks: Sequence[Tensor], size: tuple[int, int], alpha: float = 0.8, limit: int = 150
) -> Tensor:
    """Target of stage 1: features upsampled bicubically and refined by masks (Eq. 1).

    Args:
        features: (B, C, h, w), normalised.
        masks: B tensors (M, H, W) bool at ``size``.
        size: (H, W).
        alpha: as in :func:`mask_refine`.
        limit: as in :func:`mask_refine`.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: as :func:`mask_refine`.
    """
    return mask_refine(F.interpolate(features, size, mode="bicubic", align_corners=False), masks, alpha, limit)


def read_membership(features: Tensor, masks: Tensor, ridge: float = 0.3) -> Tensor:
    """How far a linear probe of the features sees each cell of a picture in each mask.

    For every cell the probe is the ridge regression of the masks' shares of the other cells on their features, so that
    what it says of a cell is a guess, with the blur and the noise that the features have, and not what it was told. It
    comes in closed form from the regression on all cells (leave-one-out residuals are ``e / (1 - H_ii)``).

    Args:
        features: (C, h, w), standardised over the cells.
        masks: (M, H, W) bool.
        ridge: as a share of the mean squared length of a cell's features.

    Returns:
        (M, h, w), about 0 outside and 1 inside, in the dtype of ``features``, float32 at least; no gradients.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        x = _wide(features).flatten(1).mT  # (cells, C)
        h, w = features.shape[-2:]
        share = F.adaptive_avg_pool2d(masks.to(x.dtype), (h, w))
        known = share.flatten(1).mT
        gram = x @ x.mT
        gram = gram / gram.diagonal().mean().clamp(min=1e-12)
        hat = torch.linalg.solve(gram + ridge * torch.eye(len(x), device=x.device, dtype=x.dtype), gram).mT
        centred = known - known.mean(0)
        leverage = hat.diagonal() + 1 / len(x)  # the mean is fitted too, and not shrunk
        guess: Tensor = known - (centred - hat @ centred) / (1 - leverage.clamp(max=0.95))[:, None]
        return guess.mT.reshape(-1, h, w)


def membership_loss(read: Tensor, masks: Tensor, sharpness: float = 6.0) -> Tensor:
    """Cross-entropy of the masks that a pixel lies in, against those that the features place it in.

    The masks' memberships are the logits of a pixel's mask, as a classifier's would be; a pixel in several masks wants
    all of them alike, one in none is left out. Masks weigh by the root of their area, so that a pole or a bird is not
    lost beside the sky.

    Args:
        read: (M, H, W), :func:`read_membership` after upsampling.
        masks: (M, H, W) bool.
        sharpness: factor on the memberships.

    Returns:
        A scalar; 0 where no pixel lies in a mask.
    """
    inside = masks.to(read.dtype).flatten(1)
    wanted = inside / inside.sum(0).clamp(min=1)
    weights = wanted * inside.sum(1, keepdim=True).clamp(min=1).rsqrt()
    if not len(read):
        return read.sum()
    loss = -(weights * (sharpness * read.flatten(1)).log_softmax(0)).sum()
    return loss / weights.sum().clamp(min=1e-12)


def affinity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine affinities of all pairs of positions (Eq. 3).

    Computed as ``(|A'A|^2 - 2 |A'B|^2 + |B'B|^2) / N^2`` with the N x C matrices A and B of normalised vectors, which
    equals the N x N form and needs C x C memory.

    Args:
        student: (B, C, H, W), any float dtype; computed in float32 at least.
        teacher: (B, C', H, W); C' may differ.

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: the grids or batches differ.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"affinities of {tuple(student.shape)} and {tuple(teacher.shape)}: the grids must be equal")
    a, b = (
        F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2), dim=1) for x in (student, teacher)
    )
    positions = a.shape[-1]
    with torch.autocast(a.device.type, enabled=False):
        # What is left when like networks are compared is small beside the three sums, hence double.
        grams = (x @ y.mT / positions for x, y in ((a, a), (a, b), (b, b)))
        own, cross, other = (gram.double().square().sum((1, 2)) for gram in grams)
    return (own - 2 * cross + other).mean().to(a.dtype)


def distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Distance of two maps.

    Args:
        student: (B, C, H, W), any float dtype; computed in float32 at least.
        teacher: likewise.
        kind: "l2" (mean squared error), "cosine" (1 - mean cosine similarity of the vectors) or "affinity"
            (:func:`affinity_loss`).

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: the maps differ in shape, or there is no such kind.
    """
    if kind not in DISTANCES:
        raise ValueError(f"unknown distance {kind!r}; expected {', '.join(DISTANCES)}")
    if kind == "affinity":
        return affinity_loss(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"distance of {tuple(student.shape)} and {tuple(teacher.shape)}: the shapes must be equal")
    a, b = _wide(student), _wide(teacher)
    return F.mse_loss(a, b) if kind == "l2" else 1 - F.cosine_similarity(a, b, dim=1).mean()


def crop_border(x: Tensor, fraction: float = 0.1) -> Tensor:
    """Cut ``fraction`` of the height and width off each side of (..., H, W), where upsamplers see half the picture.

    Rounded down to whole pixels. ValueError unless the fraction is in [0, 0.5).
    """
    if not 0 <= fraction < 0.5:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 0.5), cut off at both sides")
    rows, columns = (int(n * fraction) for n in x.shape[-2:])
    return x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]


def pool_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average (B, C, H, W) over the cells of a coarser grid: (B, C, *grid).

    Where cells are not whole pixels, a pixel on the border of two counts in both. ValueError if the grid is finer.
    """
    if x.shape[-2] < grid[0] or x.shape[-1] < grid[1]:
        raise ValueError(f"cannot pool {tuple(x.shape[-2:])} to {grid}: the grid must not be finer than the map")
    return F.adaptive_avg_pool2d(x, grid)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours of (B, C, H, W); 0 for a 1 x 1 map."""
    x = _wide(x)
    pairs = ((x[..., 1:, :], x[..., :-1, :]), (x[..., 1:], x[..., :-1]))
    return sum(((a - b).abs().mean() for a, b in pairs if a.numel()), start=x.new_zeros(()))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
