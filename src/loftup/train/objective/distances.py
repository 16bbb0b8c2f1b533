"""Distances of two dense maps (B, C, H, W), behind the channel norm."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Distance
from .maps import widened

__all__ = ["affinity_loss", "distance"]


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
    a, b = (F.normalize(widened(x).flatten(2), dim=1) for x in (student, teacher))
    positions = a.shape[-1]
    with torch.autocast(a.device.type, enabled=False):
        # What is left when like networks are compared is small beside the three sums, hence double.
        grams = (x @ y.mT / positions for x, y in ((a, a), (a, b), (b, b)))
        students, cross, teachers = (gram.double().square().sum((1, 2)) for gram in grams)
    return (students - 2 * cross + teachers).mean().to(a.dtype)


def distance(student: Tensor, teacher: Tensor, kind: Distance) -> Tensor:
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
    if kind not in get_args(Distance):
        raise ValueError(f"unknown distance {kind!r}; expected {', '.join(get_args(Distance))}")
    if kind == "affinity":
        return affinity_loss(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"distance of {tuple(student.shape)} and {tuple(teacher.shape)}: the shapes must be equal")
    a, b = widened(student), widened(teacher)
    return F.mse_loss(a, b) if kind == "l2" else 1 - F.cosine_similarity(a, b, dim=1).mean()
