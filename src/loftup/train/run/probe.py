"""A linear probe on frozen features: the quick judge of whether upsampled features are of use."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Scores", "boundary_band", "fit_probe", "score"]


@dataclass(frozen=True)
class Scores:
    """Percentages over all pixels with a label; NaN where there are none.

    Args:
        miou: mean over the classes that occur of intersection over union.
        accuracy: share of pixels classified rightly.
        boundary_miou: ``miou`` of the pixels near a label edge alone.
        per_class: IoU of every class; NaN where it occurs neither in labels nor predictions.
    """

    miou: float
    accuracy: float
    boundary_miou: float
    per_class: tuple[float, ...]


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


def score(pairs: Iterable[tuple[Tensor, Tensor]], classes: int, radius: int = 3) -> Scores:
    """Compare predictions with labels.

    Args:
        pairs: (prediction, label), (B, H, W) int64 each; labels outside [0, classes) are not counted.
        classes: how many there are.
        radius: width of the boundary band in pixels, see :func:`boundary_band`.

    Raises:
        ValueError: a prediction is of another shape than its label, or outside [0, classes).
    """
    whole = torch.zeros(classes, classes, dtype=torch.int64)
    band = torch.zeros_like(whole)
    for prediction, label in pairs:
        if prediction.shape != label.shape:
            raise ValueError(f"predictions {tuple(prediction.shape)} for labels {tuple(label.shape)}")
        if prediction.numel() and not (prediction.min() >= 0 and prediction.max() < classes):
            low, high = int(prediction.min()), int(prediction.max())
            raise ValueError(f"predictions from {low} to {high}, expected classes from 0 to {classes - 1}")
        valid = (label >= 0) & (label < classes)
        for matrix, part in ((whole, valid), (band, valid & boundary_band(label, radius))):
            cells = label[part] * classes + prediction[part]
            matrix += torch.bincount(cells.cpu(), minlength=classes**2).view(classes, classes)
    per_class, miou = _iou(whole)
    return Scores(
        miou=miou,
        accuracy=100 * float(whole.trace() / whole.sum()),
        boundary_miou=_iou(band)[1],
        per_class=tuple(per_class.tolist()),
    )


def _iou(confusion: Tensor) -> tuple[Tensor, float]:
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * hits / union, 100 * float((hits / union).nanmean())
