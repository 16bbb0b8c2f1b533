"""A linear probe on frozen features: the quick judge of whether upsampled features are of use."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Confusion", "Scores", "boundary_band", "confusion_matrix", "fit_probe", "intersection_over_union", "score"]


@dataclass(frozen=True)
class Scores:
    """Percentages over all pixels with a label; NaN where there are none."""

    miou: float  # mean over the classes that occur of intersection over union
    accuracy: float  # share of pixels classified rightly
    boundary_miou: float  # miou of the pixels near a label edge alone
    per_class: tuple[float, ...]  # IoU of every class; NaN where it occurs neither in labels nor predictions


def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    epochs: int = 20,
    batch: int = 4096,
    rate: float = 1e-2,
    weight_decay: float = 1e-4,
) -> nn.Linear:
    """Train a linear classifier of features by cross-entropy (AdamW, cosine rate), standardised over the samples.

    Args:
        features: (N, C), any float dtype.
        labels: (N,) int64 in [0, classes).
        classes: how many there are.
        seed: of the initial weights and the samples' order.
        epochs: passes over the samples.
        batch: samples a step.
        rate: highest learning rate.
        weight_decay: of AdamW.

    Returns:
        The classifier (C -> classes), the standardisation folded in.
    """
    generator = torch.Generator().manual_seed(seed)
    features = features.float()
    mean, std = features.mean(0), features.std(0)
    # What never varies must not be blown up when it does elsewhere: its weight becomes 0.
    std = std.masked_fill(std < 1e-6, math.inf)
    # Left empty, because torch's own initialisation would draw from the global random state.
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, features.shape[1], classes, device=features.device)
    with torch.no_grad():
        linear.weight.copy_(0.01 * torch.randn(linear.weight.shape, generator=generator))
        linear.bias.zero_()
    optimizer = torch.optim.AdamW(linear.parameters(), rate, weight_decay=weight_decay)
    steps = epochs * -(-len(features) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(features), generator=generator).to(features.device).split(batch):
            loss = F.cross_entropy(linear((features[part] - mean) / std), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        linear.weight.div_(std)
        linear.bias.sub_(linear.weight @ mean)
    return linear


def boundary_band(labels: Tensor, radius: int = 3) -> Tensor:
    """Pixels within ``radius`` pixels (a square around each) of another label: (B, H, W) integers to (B, H, W) bool.

    A pixel with every pixel of the (2 radius + 1)^2 square around it of its own label is outside the band.
    """
    x = labels[:, None].float()
    window = 2 * radius + 1
    # Beyond the border there is no label: max-pooling pads with -inf.
    high = F.max_pool2d(x, window, 1, radius)
    low = -F.max_pool2d(-x, window, 1, radius)
    return (high != low)[:, 0]


class Confusion:
    """Counts of labels and predictions, over all pixels with a label and over those near a label edge.

    Args:
        classes: how many there are.
        radius: width of the boundary band in pixels, see :func:`boundary_band`.
    """

    def __init__(self, classes: int, radius: int = 3) -> None:
        self.classes, self.radius = classes, radius
        self.whole = torch.zeros(classes, classes, dtype=torch.int64)
        self.band = torch.zeros_like(self.whole)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count pixels, (B, H, W) int64 each; labels outside [0, classes) are not counted.

        Raises:
            ValueError: the prediction is of another shape than the label, or outside [0, classes).
        """
        labelled = (label >= 0) & (label < self.classes)
        self.whole += confusion_matrix(prediction, label, labelled, self.classes)
        self.band += confusion_matrix(prediction, label, labelled & boundary_band(label, self.radius), self.classes)

    def scores(self) -> Scores:
        """Scores of all pixels that were counted."""
        per_class = 100 * intersection_over_union(self.whole)
        return Scores(
            miou=float(per_class.nanmean()),
            accuracy=100 * float(self.whole.trace() / self.whole.sum()),
            boundary_miou=100 * float(intersection_over_union(self.band).nanmean()),
            per_class=tuple(per_class.tolist()),
        )


def score(pairs: Iterable[tuple[Tensor, Tensor]], classes: int, radius: int = 3) -> Scores:
    """Compare predictions with labels, (prediction, label) as :meth:`Confusion.update` takes them."""
    confusion = Confusion(classes, radius)
    for prediction, label in pairs:
        confusion.update(prediction, label)
    return confusion.scores()


def confusion_matrix(prediction: Tensor, label: Tensor, counted: Tensor, classes: int) -> Tensor:
    """Number of pixels of every label (row) and prediction (column), (classes, classes) int64 on the CPU.

    Args:
        prediction: any shape, int64 in [0, classes).
        label: of the same shape; in [0, classes) where it is counted.
        counted: bool, the pixels to count.
        classes: how many there are.

    Raises:
        ValueError: the prediction is of another shape than the label, or outside [0, classes).
    """
    if prediction.shape != label.shape:
        raise ValueError(f"predictions {tuple(prediction.shape)} for labels {tuple(label.shape)}")
    if prediction.numel() and not (prediction.min() >= 0 and prediction.max() < classes):
        low, high = int(prediction.min()), int(prediction.max())
        raise ValueError(f"predictions from {low} to {high}, expected classes from 0 to {classes - 1}")
    cells = label[counted] * classes + prediction[counted]
    return torch.bincount(cells.cpu(), minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """IoU in [0, 1] of every class of a confusion matrix, (classes,) float64; NaN where a class never occurs."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)
