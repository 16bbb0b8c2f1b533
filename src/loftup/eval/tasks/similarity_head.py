"""Selecting an object by likeness to the clicks alone: nothing but a threshold is learned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .clicks import Click, similarity_maps

__all__ = ["SimilarityHead", "ThresholdFit"]

STEPS = 200  # thresholds that are tried, over [-1, 1]


class SimilarityHead(nn.Module):
    """Features and clicks to the logits of a mask, which is where a pixel is like a positive click.

    That is, where its likeness (:func:`~loftup.eval.tasks.clicks.similarity_maps`) is above the threshold, and greater
    to a positive click than to every negative one.

    Args:
        threshold: in [-1, 1].
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, features: Tensor, clicks: Sequence[list[Click]]) -> Tensor:
        """Features (B, C, n, m) and every picture's clicks in pixels of that grid to logits (B, n, m)."""
        logits = []
        for each, its_clicks in zip(features, clicks, strict=True):
            positive, negative = similarity_maps(each, its_clicks)
            floor = negative.clamp(min=self.threshold) if any(not c.positive for c in its_clicks) else self.threshold
            logits.append(positive - floor)
        return torch.stack(logits)


class ThresholdFit:
    """Mean IoU of every threshold over objects that are seen one by one."""

    def __init__(self) -> None:
        self.count = 0
        self.ious = torch.zeros(STEPS, dtype=torch.float64)

    def add(self, similarity: Tensor, mask: Tensor) -> None:
        """Likeness (n, m) to a click and the object (n, m): 1 object, 0 not, -1 not to count."""
        # A pixel in bin k is selected by thresholds 0 to k.
        bins = ((similarity + 1) / 2 * STEPS).long().clamp(0, STEPS - 1).cpu()
        above = [bins[mask == value].bincount(minlength=STEPS).flip(0).cumsum(0).flip(0) for value in (0, 1)]
        self.ious += above[1].double() / (above[0] + (mask == 1).sum()).clamp(min=1)
        self.count += 1

    def best(self) -> float:
        """The threshold of the greatest mean IoU."""
        return 2 * int(self.ious.argmax()) / STEPS - 1
