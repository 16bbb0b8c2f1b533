"""A probe of every picture's masks, read at low resolution and judged on the output's pixels.

The student's attention averages the probe's guesses, and cross-entropy compares them with the masks: the way that a
linear probe goes which is trained at low resolution and used on the output, without classes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import SegmentsConfig
from ..data.views import Batch
from .maps import cut, near_outlines, some, widened

__all__ = ["guesses", "membership_loss", "read_membership", "segments"]


def guesses(settings: SegmentsConfig, normalised: Tensor, batch: Batch) -> Tensor:
    """The probe's guesses for the cells: (B, M, h, w), zeros for a picture that has fewer masks."""
    masks = [some(of_picture, settings.masks) for of_picture in batch.masks]
    h, w = normalised.shape[-2:]
    values = normalised.new_zeros(len(masks), max(1, *map(len, masks)), h, w)
    for index, of_picture in enumerate(masks):
        if len(of_picture):
            values[index, : len(of_picture)] = read_membership(normalised[index], of_picture, settings.ridge)
    return values


def segments(settings: SegmentsConfig, upsampled: Tensor, batch: Batch) -> Tensor:
    """The loss of the guesses as the student's attention averages them in the batch's window."""
    losses = []
    for read, of_picture in zip(upsampled, batch.masks, strict=True):
        masks = some(of_picture, settings.masks)
        losses.append(
            membership_loss(
                read[: len(masks)],
                cut(masks, batch.window),
                area=settings.area,
                edges=settings.edges,
                overlap=settings.overlap,
            )
        )
    return torch.stack(losses).mean()


def read_membership(features: Tensor, masks: Tensor, ridge: float = 0.3) -> Tensor:
    """Guess by a linear probe of the features how far each cell of a picture lies in each mask.

    For every cell the probe is the ridge regression of the masks' shares of the other cells on their features, so that
    its word on a cell is a guess, with the blur and the noise that the features have, and not the answer. It
    comes in closed form from the regression on all cells (leave-one-out residuals are ``e / (1 - H_ii)``).

    Args:
        features: (C, h, w), standardised over the cells.
        masks: (M, H, W) bool.
        ridge: as a share of the mean squared length of a cell's features.

    Returns:
        (M, h, w), about 0 outside and 1 inside, in the dtype of ``features``, float32 at least; no gradients.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        x = rearrange(widened(features), "c h w -> (h w) c")
        h, w = features.shape[-2:]
        shares = rearrange(F.adaptive_avg_pool2d(masks.to(x.dtype), (h, w)), "m h w -> (h w) m")
        gram = x @ x.mT
        gram = gram / gram.diagonal().mean().clamp(min=1e-12)
        hat = torch.linalg.solve(gram + ridge * torch.eye(len(x), device=x.device, dtype=x.dtype), gram).mT
        centred = shares - shares.mean(0)
        leverage = hat.diagonal() + 1 / len(x)  # the mean is fitted too, and not shrunk
        guess: Tensor = shares - (centred - hat @ centred) / (1 - leverage.clamp(max=0.95))[:, None]
        return rearrange(guess, "(h w) m -> m h w", h=h)


def membership_loss(
    read: Tensor, masks: Tensor, sharpness: float = 6.0, area: float = 0.5, edges: float = 0.0, overlap: float = 0.0
) -> Tensor:
    """Cross-entropy of the masks that a pixel lies in, against those that the features place it in.

    The masks' memberships are the logits of a pixel's mask, as a classifier's would be; a pixel in several masks wants
    all of them alike, one in none is left out. Small masks weigh more for their size, so that a pole or a bird is not
    lost beside the sky.

    Args:
        read: (M, H, W), :func:`read_membership` after upsampling.
        masks: (M, H, W) bool.
        sharpness: factor on the memberships.
        area: a mask's pixels weigh by its area to the power of minus this.
        edges: further weight of the pixels within two of an outline, as a share of their own.
        overlap: weight of 1 minus the masks' mean :func:`loftup.train.objective.maps.soft_overlap`.

    Returns:
        A scalar; 0 where no pixel lies in a mask.
    """
    if not len(read):
        return read.sum()
    inside = masks.to(read.dtype).flatten(1)
    targets = inside / inside.sum(0).clamp(min=1)
    weights = targets * inside.sum(1, keepdim=True).clamp(min=1) ** -area
    if edges:
        weights = weights * (1 + edges * near_outlines(masks).flatten())
    logarithms = (sharpness * read.flatten(1)).log_softmax(0)
    loss = -(weights * logarithms).sum() / weights.sum().clamp(min=1e-12)
    if overlap:
        shares = logarithms.exp() * masks.any(0).flatten()
        both = (shares * targets).sum(1)
        either = (shares + targets).sum(1) - both
        loss = loss + overlap * (1 - (both + 1) / (either + 1)).mean()
    return loss
