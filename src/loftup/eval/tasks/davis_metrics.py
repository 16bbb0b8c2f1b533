"""J and F of video object segmentation, as the official DAVIS toolkits define them (Perazzi et al. 2016)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import translate
from ...train.run.probe import confusion_matrix, intersection_over_union

__all__ = ["Statistics", "boundary_f", "boundary_map", "jaccard", "object_statistics"]

BOUND_TH = 0.008  # tolerance of the boundary measure, in picture diagonals
BINS = 4  # of the decay


@dataclass(frozen=True)
class Statistics:
    """Of one object's values over the frames, NaN where no frame is judged."""

    mean: float  # of the values
    recall: float  # share of the frames with a value above 0.5
    decay: float  # mean of the first quarter of the frames less that of the last: what is lost over time


def jaccard(prediction: Tensor, truth: Tensor, void: Tensor | None = None) -> float:
    """Region similarity J: intersection over union, 1 where both masks are empty.

    Args:
        prediction: (H, W) bool.
        truth: (H, W) bool.
        void: (H, W) bool, pixels not to count.

    Returns:
        In [0, 1].

    Raises:
        ValueError: the masks are not three bool maps of one size.
    """
    prediction, truth = _judged(prediction, truth, void)
    counts = confusion_matrix(prediction.long(), truth.long(), torch.ones_like(truth), 2)
    iou = float(intersection_over_union(counts)[1])
    return 1.0 if math.isnan(iou) else iou


def boundary_f(prediction: Tensor, truth: Tensor, void: Tensor | None = None, bound_th: float = BOUND_TH) -> float:
    """Boundary accuracy F: of the boundaries' pixels matched within a tolerance, 2 P R / (P + R).

    Without a boundary in one mask, precision and recall are 1 and 0 or 0 and 1, so that F is 0; without any in both it
    is 1. A mask that fills the picture has no boundary, as an empty one.

    Masks, result and errors are as :func:`jaccard`'s; ``bound_th`` is the tolerance, in picture diagonals (rounded up
    to whole pixels) or, from 1 on, in pixels.
    """
    prediction, truth = _judged(prediction, truth, void)
    radius = bound_th if bound_th >= 1 else math.ceil(bound_th * math.hypot(*truth.shape))
    ours, theirs = boundary_map(prediction), boundary_map(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = int((ours & _dilated(theirs, radius)).sum()) / int(ours.sum())
    recall = int((theirs & _dilated(ours, radius)).sum()) / int(theirs.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary_map(mask: Tensor) -> Tensor:
    """Pixels (H, W) bool of a mask (H, W) bool that differ from their neighbour to the right, below or both."""
    # Beyond the last row and column stands their own copy; the corner then has nothing to differ from.
    padded = torch.cat([mask, mask[-1:]])
    padded = torch.cat([padded, padded[:, -1:]], 1)
    edge: Tensor = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return edge


def object_statistics(values: list[float]) -> Statistics:
    """Mean, recall and decay of an object's values over the frames, in their order."""
    if not values:
        return Statistics(math.nan, math.nan, math.nan)
    scores = np.asarray(values, dtype=np.float64)
    # The official bins share their end frames, and half a frame rounds up.
    ends = np.round(np.linspace(1, len(scores), BINS + 1) + 1e-10).astype(int) - 1
    decay = scores[ends[0] : ends[1] + 1].mean() - scores[ends[-2] : ends[-1] + 1].mean()
    return Statistics(float(scores.mean()), float((scores > 0.5).mean()), float(decay))


def _judged(prediction: Tensor, truth: Tensor, void: Tensor | None) -> tuple[Tensor, Tensor]:
    void = torch.zeros_like(truth) if void is None else void
    masks = {"prediction": prediction, "truth": truth, "void": void}
    if truth.ndim != 2 or any(mask.shape != truth.shape or mask.dtype != torch.bool for mask in masks.values()):
        got = ", ".join(f"{name} {mask.dtype} {tuple(mask.shape)}" for name, mask in masks.items())
        raise ValueError(f"masks must be bool and of one size (H, W), got {got}")
    return (prediction & ~void).cpu(), (truth & ~void).cpu()


def _dilated(mask: Tensor, radius: float) -> Tensor:
    """Pixels within a radius of the mask, as a dilation by a disk; the mask has at least one pixel."""
    with translate(ImportError, 'the boundary measure needs SciPy: pip install "loftup[eval]"'):
        from scipy.ndimage import distance_transform_edt
    return torch.from_numpy(distance_transform_edt(~mask.numpy()) <= radius)
