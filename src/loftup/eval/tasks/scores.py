"""Scores of label maps, as the tasks report them."""

import torch

from ...train.run.probe import Scores
from ..result import Metric

__all__ = ["METRICS", "class_details", "percentages"]

METRICS = {
    "miou": Metric("mIoU %", 2),
    "accuracy": Metric("accuracy %", 2),
    "boundary_miou": Metric("boundary mIoU %", 2),
}


def percentages(scores: Scores) -> dict[str, float]:
    """The values of METRICS."""
    return {name: getattr(scores, name) for name in METRICS}


def class_details(names: tuple[str, ...], scores: list[Scores]) -> dict[str, dict[str, float]]:
    """IoU of every class, the mean over the seeds where it occurs."""
    ious = torch.tensor([each.per_class for each in scores], dtype=torch.float64).nanmean(0).tolist()
    return {name: {"iou": value} for name, value in zip(names, ious, strict=True)}
