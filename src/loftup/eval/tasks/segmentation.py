"""Semantic segmentation with a linear probe (paper section 4, table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...backbones import Backbone
from ...progress import track
from ...train.config.schema import Count, Positive, Whole
from ...train.run.probe import Confusion, fit_probe
from ..colour import label_picture, palette
from ..datasets.base import Dataset, SegmentationSample
from ..result import Metric, Result
from ..upsamplers.access import at_pixels
from ..upsamplers.registry import Upsampler
from .grid import GridConfig, GridTask
from .loops import minimise, walk
from .scores import METRICS as UPSAMPLED
from .scores import class_details, percentages

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "SAMPLES", "SegmentationConfig", "segmentation"]

SAMPLES = 500_000  # vectors of all pictures that are held for a probe and seed

LOWRES = {f"lowres_probe_{name}": Metric(f"low-res probe {metric.heading}", 2) for name, metric in UPSAMPLED.items()}
METRICS = UPSAMPLED | LOWRES


@dataclass
class SegmentationConfig(GridConfig):
    """Protocol of the linear probe, beside the settings of :class:`GridConfig`; the defaults are the paper's.

    Args:
        training: "dense" trains on every pixel (Adam); "samples" on pixels drawn from every picture (AdamW,
            standardised features, :mod:`loftup.train.run.probe`), in one pass over the pictures for all seeds.
        epochs: of "dense".
        batch: pictures a step, of "dense".
        rate: learning rate of "dense".
        points: pixels drawn from every picture and seed, of "samples" and for the low-resolution probe; fewer where
            all pictures together would give more than SAMPLES.
        probes: "upsampled" is trained on upsampled features; "lowres" on the backbone's features at the cells'
            centres, and judged on the upsampled ones: it tells whether the upsampler keeps the feature space.
        boundary: pixels this close to a label edge count for the boundary scores.

    Raises:
        ValueError: a value is none of those named here, or a count is not positive.
    """

    training: str = "dense"
    epochs: Count = 10
    batch: Count = 8
    rate: Positive = 1e-4
    points: Count = 500
    probes: list[str] = field(default_factory=lambda: ["upsampled"])
    boundary: Whole = 3

    def __post_init__(self) -> None:
        if self.training not in ("dense", "samples"):
            raise ValueError(f"training must be 'dense' or 'samples', got {self.training!r}")
        if not self.probes or set(self.probes) - {"upsampled", "lowres"}:
            raise ValueError(f"probes must name 'upsampled', 'lowres' or both, got {list(self.probes)}")
        super().__post_init__()
        for name in ("epochs", "batch", "points", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def segmentation(
    backbone: Backbone,
    upsampler: Upsampler,
    dataset: Dataset[SegmentationSample],
    config: SegmentationConfig | None = None,
) -> Result:
    """Train linear probes on features of the training split and judge them on the validation split.

    All seeds and probes are judged in one pass with one head, through the upsampler's stream where it has one; the
    upsampled features of the dataset are never stored.

    Returns:
        The metrics of METRICS, "classes" in the details, and pictures of the first seed's first probe.

    Raises:
        ValueError: a split is empty, there are no classes, or the training split has no labelled pixel.
    """
    config = config or SegmentationConfig()
    probing = Probing(backbone, upsampler, dataset, config)
    probing.check_splits()
    dataset.check_classes()
    if config.training == "samples":
        heads = probing.train_on_samples()
    else:
        heads = probing.train_on_samples(("lowres",)) if "lowres" in config.probes else {}
        if "upsampled" in config.probes:
            heads["upsampled"] = [probing.train_densely(seed) for seed in range(config.seeds)]
    return probing.judge({probe: heads[probe] for probe in config.probes})


class Probing(GridTask):
    """Training and judging of linear probes; the methods are the steps of :func:`segmentation`."""

    config: SegmentationConfig

    @property
    def classes(self) -> int:
        """Number of the dataset's classes."""
        return len(self.dataset.classes)

    def truth(self, sample: SegmentationSample) -> Tensor:
        """(1, H, W) float, which holds every label exactly."""
        return sample.labels[None].float()

    def load(self, samples: Sequence[SegmentationSample]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), features (B, C, h, w) and labels (B, H', W') int64."""
        image, features, labels = super().load(samples)
        return image, features, rearrange(labels, "b 1 h w -> b h w").long()

    def train_densely(self, seed: int) -> nn.Linear:
        """A probe trained on every pixel of the upsampled features."""
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        probe: nn.Linear = nn.utils.skip_init(nn.Linear, self.backbone.channels, self.classes)
        nn.init.zeros_(probe.bias)
        with torch.no_grad():
            probe.weight.copy_(0.01 * torch.randn(probe.weight.shape, generator=generator))
        probe.to(config.device)

        def loss(samples: list[SegmentationSample]) -> Tensor | None:
            image, features, labels = self.load(samples)
            if (labels < 0).all():
                return None
            logits = self.enlarge(_linear(self.dense(features, image), probe.weight, probe.bias))
            return F.cross_entropy(logits, labels, ignore_index=-1)

        optimizer = torch.optim.Adam(probe.parameters(), config.rate)
        caption = f"train probe {seed + 1}/{config.seeds}"
        if not minimise(loss, self.dataset.train, optimizer, config, generator, caption):
            raise self.unlabelled()
        return probe

    def train_on_samples(self, probes: Sequence[str] | None = None) -> dict[str, list[nn.Linear]]:
        """Probes of every seed, by name, trained on pixels drawn in one pass over the pictures."""
        config, seeds = self.config, range(self.config.seeds)
        probes = config.probes if probes is None else probes
        points = max(1, min(config.points, SAMPLES // len(self.dataset.train)))
        # One each, so that the scores of one probe do not depend on whether the other is trained too.
        generators = {probe: torch.Generator().manual_seed(7) for probe in probes}
        pairs: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {(p, s): [] for p in probes for s in seeds}
        for sample in track(self.dataset.train, "draw pixels", len(self.dataset.train), leave=False):
            image, features, labels = self.load([sample])
            positions = (labels[0] >= 0).nonzero().cpu()
            if not len(positions):
                continue
            if "upsampled" in probes:
                draw = _draw(len(positions), points * config.seeds, generators["upsampled"])
                pixels = positions[draw].to(config.device)
                vectors = at_pixels(self.upsampler, features, image, config.grid, pixels[None])[0]
                classes = labels[0, pixels[:, 0], pixels[:, 1]]
                for seed in seeds:
                    pairs["upsampled", seed].append((vectors[seed :: config.seeds], classes[seed :: config.seeds]))
            if "lowres" in probes:
                cells = F.interpolate(labels[:, None].double(), features.shape[-2:], mode="nearest-exact").long()
                vectors, classes = rearrange(features, "1 c h w -> (h w) c"), cells.flatten()
                vectors, classes = vectors[classes >= 0], classes[classes >= 0]
                for seed in seeds if len(classes) else ():
                    draw = _draw(len(classes), min(points, len(classes)), generators["lowres"]).to(config.device)
                    pairs["lowres", seed].append((vectors[draw], classes[draw]))
        if not all(pairs.values()):
            raise self.unlabelled()
        heads: dict[str, list[nn.Linear]] = {probe: [] for probe in probes}
        for (probe, seed), its_pairs in pairs.items():
            vectors, classes = (torch.cat(tensors) for tensors in zip(*its_pairs, strict=True))
            heads[probe].append(fit_probe(vectors, classes, self.classes, seed=seed))
        return heads

    @torch.no_grad()
    def judge(self, heads: dict[str, list[nn.Linear]]) -> Result:
        """Scores of all probes and seeds on the validation split, in one pass with one head."""
        flat = [(probe, head) for probe, its_heads in heads.items() for head in its_heads]
        weight = torch.cat([head.weight for _, head in flat])
        bias = torch.cat([head.bias for _, head in flat])
        confusions = [Confusion(self.classes, self.config.boundary) for _ in flat]
        colours = self.dataset.colours or palette(self.classes)
        pictures: list[dict[str, Image.Image]] = []
        for sample, show in walk(self.dataset.val, "judge", self.config.pictures):
            image, features, labels = self.load([sample])
            logits = self.predict(lambda x: _linear(x, weight, bias), features, image)
            predictions = [part.argmax(1) for part in logits.split(self.classes, dim=1)]
            for prediction, confusion in zip(predictions, confusions, strict=True):
                confusion.update(prediction, labels)
            if show:
                truth, ours = (label_picture(each[0], colours) for each in (labels, predictions[0]))
                pictures.append({"image": self.thumbnail(image), "truth": truth, "ours": ours})
        metrics: dict[str, list[float]] = {}
        scores = [confusion.scores() for confusion in confusions]
        for (probe, _), its_scores in zip(flat, scores, strict=True):
            prefix = "lowres_probe_" if probe == "lowres" else ""
            for name, value in percentages(its_scores).items():
                metrics.setdefault(prefix + name, []).append(value)
        first = scores[: self.config.seeds]
        return Result(metrics, {"classes": class_details(self.dataset.classes, first)}, pictures)

    def unlabelled(self) -> ValueError:
        """The error for a training split that teaches nothing."""
        pictures = f"{len(self.dataset.train)} pictures of {self.dataset.name}'s training split"
        return ValueError(f"none of the {pictures} has a labelled pixel to learn from")


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), bias.to(x.dtype))


def _draw(available: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices below ``available`` at random, each once before any is repeated."""
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    return torch.cat(rounds)[:count]
