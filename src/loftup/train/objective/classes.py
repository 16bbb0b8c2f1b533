"""Linear probes of classes, one that reads the cells and one that reads the output, judged on the output's pixels.

The attention averages both probes' logits, which is what a linear probe makes of averaged features. The first probe
learns from the low-resolution features alone and asks that the output keep their space; the second learns with the
upsampler.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from ..config import TrainConfig
from ..data.views import Batch
from .maps import cut, near_outlines, soft_overlap
from .standardise import Standardisation

__all__ = ["Classes"]

FEWEST = 0.002  # of all pixels, which a class counts as having when it is weighed


class _Probes(nn.Module):
    """Both probes of one backbone's features for one source of pictures."""

    counts: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.cells = nn.Linear(channels, classes)
        self.output = nn.Linear(channels, classes)
        for layer in (self.cells, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("counts", torch.zeros(classes))  # of pixels seen

    def weights(self, rarity: float) -> Tensor:
        """Of the classes: their share of the pixels to the power of minus the rarity, (K,); a mean share weighs 1."""
        total = self.counts.sum().clamp(min=1)
        return (total / len(self.counts) / (self.counts + FEWEST * total)) ** rarity


class Classes(nn.Module):
    """The term, with the probes, which are trained beside the upsampler.

    Args:
        config: of the run, whose term has a weight.
        backbones: of the run.
    """

    def __init__(self, config: TrainConfig, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        self.settings, self.classes = config.objective.classes, config.data.classes
        self.probes = nn.ModuleDict(
            {
                f"{number}_{source}": _Probes(backbone.channels, count)
                for number, backbone in enumerate(backbones)
                for source, count in enumerate(self.classes)
                if count
            }
        )

    def values(self, features: Tensor, standardise: Standardisation, batch: Batch) -> Tensor:
        """The logits that the student is to average: (B, 2 K, h, w), K of the source with most classes.

        Those of a source with fewer are followed by zeros, and a picture without labels has zeros.
        """
        most = max(self.classes)
        rows = []
        for cells, source, labels in zip(standardise(features), batch.sources, batch.labels, strict=True):
            row = cells.new_zeros(2, most, *cells.shape[1:])
            if labels is not None:
                probes = self._probes(batch, source)
                count = len(probes.counts)
                frozen = (probes.cells.weight.detach(), probes.cells.bias.detach())
                pair = (_read(cells, *frozen), _read(cells, probes.output.weight, probes.output.bias))
                row = torch.cat([torch.stack(pair), row[:, count:]], 1)
            rows.append(row.flatten(0, 1))
        return torch.stack(rows)

    def loss(self, logits: Tensor, features: Tensor, standardise: Standardisation, batch: Batch) -> Tensor:
        """Both probes' losses on the output, and that of the first on the cells, by which it learns.

        Args:
            logits: (B, 2 K, ...), the window of the student's average of :meth:`values`.
            features: (B, C, h, w), as the backbone gave them.
            standardise: of all their channels.
            batch: with labels.
        """
        losses = []
        scaled = standardise(features).float()
        for read, cells, source, labels in zip(logits.float(), scaled, batch.sources, batch.labels, strict=True):
            if labels is None:
                continue
            probes = self._probes(batch, source)
            count = len(probes.counts)
            small = F.interpolate(labels[None, None].double(), cells.shape[1:], mode="nearest-exact")[0, 0].long()
            own = _read(cells, probes.cells.weight, probes.cells.bias)
            losses.append(_entropy(own, small))
            inside = labels[labels >= 0]
            if self.training:
                probes.counts += torch.bincount(inside, minlength=count).to(probes.counts)
            weights = probes.weights(self.settings.rarity)
            seen = cut(labels, batch.window)
            losses += [self._on_output(part[:count], seen, weights) for part in read.unflatten(0, (2, -1))]
        return torch.stack(losses).sum() / len(logits) if losses else logits.sum() * 0

    def _probes(self, batch: Batch, source: int) -> _Probes:
        probes = self.probes[f"{batch.backbone}_{source}"]
        assert isinstance(probes, _Probes)
        return probes

    def _on_output(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy with weights of classes and outlines, and soft intersection over union of what is there."""
        known = labels >= 0
        each = F.one_hot(labels.clamp(min=0), len(weights)).movedim(-1, 0).bool() & known
        weight = weights[labels.clamp(min=0)] * known
        if self.settings.edges:
            weight = weight * (1 + self.settings.edges * near_outlines(each))
        entropy = F.cross_entropy(logits[None], labels.clamp(min=0)[None], reduction="none")[0]
        loss = (entropy * weight).sum() / weight.sum().clamp(min=1e-12)
        if self.settings.overlap:
            there = each.flatten(1).any(1)
            shares = (logits.softmax(0) * known).flatten(1)[there]
            loss = loss + self.settings.overlap * (1 - soft_overlap(shares, each.flatten(1)[there].to(shares)))
        return loss


def _read(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (K, h, w) of features (C, h, w), in their dtype also under autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("kc,chw->khw", weight.to(features.dtype), features) + bias.to(features.dtype)[:, None, None]


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    known = labels >= 0
    entropy = F.cross_entropy(logits[None], labels.clamp(min=0)[None], reduction="none")[0]
    return (entropy * known).sum() / known.sum().clamp(min=1)
