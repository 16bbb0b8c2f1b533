"""Scores of label maps, gathered batch by batch."""

import torch
from torch import Tensor

from ...errors import LoftUpError
from ...train.run.probe import boundary_band

__all__ = ["Confusion", "class_details"]


class Confusion:
    """Counts of (label, prediction) over all pixels and over those near a label edge.

    Args:
        classes: how many there are.
        radius: width of the band around label edges in pixels, see :func:`loftup.train.run.probe.boundary_band`.

    Raises:
        LoftUpError: torchmetrics is not installed.
    """

    def __init__(self, classes: int, radius: int = 3) -> None:
        try:
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError as error:
            raise LoftUpError('the tasks need torchmetrics: pip install "loftup[eval]"') from error
        self.radius = radius
        self.whole = MulticlassConfusionMatrix(classes, ignore_index=-1)
        self.band = MulticlassConfusionMatrix(classes, ignore_index=-1)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count (B, H, W) int64 predictions against labels, -1 where there is none."""
        prediction, labels = prediction.cpu(), labels.cpu()
        self.whole.update(prediction, labels)
        self.band.update(prediction, labels.masked_fill(~boundary_band(labels, self.radius), -1))

    @property
    def per_class(self) -> Tensor:
        """Intersection over union of every class in percent; NaN where it is neither labelled nor predicted."""
        return _iou(self.whole.compute())

    def scores(self) -> dict[str, float]:
        """Percentages: miou and boundary_miou are means over the classes that occur; accuracy is of pixels."""
        counts = self.whole.compute()
        return {
            "miou": float(self.per_class.nanmean()),
            "accuracy": 100 * float(counts.trace() / counts.sum()),
            "boundary_miou": float(_iou(self.band.compute()).nanmean()),
        }


def _iou(counts: Tensor) -> Tensor:
    hits = counts.diagonal().double()
    return 100 * hits / (counts.sum(0) + counts.sum(1) - hits)


def class_details(names: tuple[str, ...], confusions: list[Confusion]) -> dict[str, dict[str, float]]:
    """IoU of every class, the mean over seeds."""
    ious = torch.stack([confusion.per_class for confusion in confusions]).nanmean(0).tolist()
    return {name: {"iou": value} for name, value in zip(names, ious, strict=True)}
