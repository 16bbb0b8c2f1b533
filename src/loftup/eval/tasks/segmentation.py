"""Semantic segmentation with a linear probe (paper section 4, table 1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from ...train.run.probe import fit_probe
from ..colour import label_picture, palette, picture
from ..datasets.base import Dataset, SegmentationSample
from ..datasets.prepare import fit
from ..features import at_pixels, extract, with_head
from ..progress import bar
from ..result import Metric, Result, spread
from ..upsamplers.registry import Upsampler
from .scores import Confusion, class_details

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "SAMPLES", "SegmentationConfig", "segmentation"]

SAMPLES = 500_000  # vectors of all pictures that are held for a probe and seed

METRICS = {
    "miou": Metric("mIoU %", 2),
    "accuracy": Metric("accuracy %", 2),
    "boundary_miou": Metric("boundary mIoU %", 2),
    "lowres_probe_miou": Metric("low-res probe mIoU %", 2),
    "lowres_probe_accuracy": Metric("low-res probe accuracy %", 2),
    "lowres_probe_boundary_miou": Metric("low-res probe boundary mIoU %", 2),
}


@dataclass
class SegmentationConfig:
    """Protocol of the linear probe; the defaults are the paper's.

    Args:
        size: [height, width] that pictures are scaled to cover and cut to.
        output: share of ``size`` at which features are upsampled and judged.
        training: "dense" trains on every pixel (Adam); "samples" on pixels drawn from every picture (AdamW,
            standardised features, :mod:`loftup.train.run.probe`), in one pass over the pictures for all seeds.
        epochs: of "dense".
        batch: pictures a step, of "dense".
        rate: learning rate of "dense".
        points: pixels drawn from every picture and seed, of "samples" and for the low-resolution probe; fewer where
            all pictures together would give more than SAMPLES.
        probes: "upsampled" is trained on upsampled features; "lowres" on the backbone's features at the cells'
            centres, and judged on the upsampled ones: it tells whether the upsampler keeps the feature space.
        seeds: probes to train, each with its own initial weights, order and pixels.
        boundary: pixels this close to a label edge count for the boundary scores.
        pictures: of the validation split, to show, evenly spread.
        device: to compute on.

    Raises:
        ValueError: a value is none of those named here, or a count is not positive.
    """

    size: list[int] = field(default_factory=lambda: [224, 224])
    output: float = 1.0
    training: str = "dense"
    epochs: int = 10
    batch: int = 8
    rate: float = 1e-4
    points: int = 500
    probes: list[str] = field(default_factory=lambda: ["upsampled"])
    seeds: int = 3
    boundary: int = 3
    pictures: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.training not in ("dense", "samples"):
            raise ValueError(f"training must be 'dense' or 'samples', got {self.training!r}")
        if not self.probes or set(self.probes) - {"upsampled", "lowres"}:
            raise ValueError(f"probes must name 'upsampled', 'lowres' or both, got {list(self.probes)}")
        if len(self.size) != 2 or min(self.size) < 1 or not 0 < self.output <= 1:
            raise ValueError(f"size must be [height, width] and output in (0, 1], got {self.size} and {self.output}")
        for name in ("epochs", "batch", "points", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def grid(self) -> tuple[int, int]:
        """(H', W') of the upsampled features."""
        return max(1, round(self.size[0] * self.output)), max(1, round(self.size[1] * self.output))


def segmentation(
    backbone: Backbone,
    upsampler: Upsampler,
    dataset: Dataset[SegmentationSample],
    config: SegmentationConfig | None = None,
) -> Result:
    """Train linear probes on features of the training split and judge them on the validation split.

    All seeds and probes are judged in one pass with one head, through the upsampler's stream where it has one; the
    upsampled features of the dataset are never stored.

    Args:
        backbone: frozen, in ``eval()`` mode.
        upsampler: of its features.
        dataset: with classes.
        config: of the protocol; None for the paper's.

    Returns:
        The metrics of METRICS, "classes" in the details, and pictures of the first seed's first probe.

    Raises:
        ValueError: a split is empty, there are no classes, or the training split has no labelled pixel.
        LoftUpError: torchmetrics is not installed.
    """
    config = config or SegmentationConfig()
    if not len(dataset.train) or not len(dataset.val):
        raise ValueError(f"{dataset.name} has {len(dataset.train)} training and {len(dataset.val)} validation pictures")
    if not dataset.classes:
        raise ValueError(f"{dataset.name} names no classes, expected one name for every label")
    task = _Task(backbone, upsampler, dataset, config)
    heads: dict[str, list[nn.Linear]] = {}
    if config.training == "samples":
        heads = task.train_on_samples()
    else:
        if "upsampled" in config.probes:
            heads["upsampled"] = [task.train_densely(seed) for seed in range(config.seeds)]
        if "lowres" in config.probes:
            heads |= task.train_on_samples(("lowres",))
    return task.judge({probe: heads[probe] for probe in config.probes})


@dataclass
class _Task:
    backbone: Backbone
    upsampler: Upsampler
    dataset: Dataset[SegmentationSample]
    config: SegmentationConfig

    @property
    def classes(self) -> int:
        return len(self.dataset.classes)

    def frames(self, samples: Sequence[SegmentationSample], what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Image (1, 3, H, W), features (1, C, h, w) and labels (1, H', W') of every sample."""
        for sample in bar(samples, what, len(samples)):
            yield self.load([sample])

    def load(self, samples: list[SegmentationSample]) -> tuple[Tensor, Tensor, Tensor]:
        height, width = self.config.size
        pairs = [fit(sample.image, sample.labels, size=(height, width)) for sample in samples]
        image, labels = (torch.stack(tensors).to(self.config.device) for tensors in zip(*pairs, strict=True))
        labels = F.interpolate(labels[:, None].double(), self.config.grid, mode="nearest")[:, 0].long()
        return image, extract(self.backbone, image), labels

    @property
    def native(self) -> bool:
        return getattr(self.upsampler, "native", False)

    def enlarge(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits, self.config.grid, mode="bilinear", align_corners=False)

    def logits(self, image: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, K, H', W') of a linear head."""

        def head(x: Tensor) -> Tensor:
            return _linear(x, weight, bias)

        if self.native:
            return self.enlarge(head(features))
        return with_head(self.upsampler, features, image, self.config.grid, head)

    def train_densely(self, seed: int) -> nn.Linear:
        config, samples = self.config, self.dataset.train
        generator = torch.Generator().manual_seed(seed)
        probe: nn.Linear = nn.utils.skip_init(nn.Linear, self.backbone.channels, self.classes)
        nn.init.zeros_(probe.bias)
        with torch.no_grad():
            probe.weight.copy_(0.01 * torch.randn(probe.weight.shape, generator=generator))
        probe.to(config.device)
        optimizer = torch.optim.Adam(probe.parameters(), config.rate)
        steps = [
            chosen
            for _ in range(config.epochs)
            for chosen in torch.randperm(len(samples), generator=generator).split(config.batch)
        ]
        trained = False
        for chosen in bar(steps, f"train probe {seed + 1}/{config.seeds}"):
            image, features, labels = self.load([samples[int(index)] for index in chosen])
            if (labels < 0).all():
                continue
            trained = True
            if not self.native:
                with torch.no_grad():  # an upsampler's own parameters may want gradients
                    features = self.upsampler(features, image, config.grid)
            raw = _linear(features, probe.weight, probe.bias)
            loss = F.cross_entropy(self.enlarge(raw) if self.native else raw, labels, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not trained:
            raise self.unlabelled()
        return probe

    def train_on_samples(self, probes: Sequence[str] | None = None) -> dict[str, list[nn.Linear]]:
        config, seeds = self.config, range(self.config.seeds)
        probes = config.probes if probes is None else probes
        points = max(1, min(config.points, SAMPLES // len(self.dataset.train)))
        generator = torch.Generator().manual_seed(7)
        drawn: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {(p, s): [] for p in probes for s in seeds}
        for image, features, labels in self.frames(self.dataset.train, "draw pixels"):
            known = (labels[0] >= 0).nonzero().cpu()
            if not len(known):
                continue
            if "upsampled" in probes:
                pixels = known[_draw(len(known), points * config.seeds, generator)].to(config.device)
                vectors = at_pixels(self.upsampler, features, image, config.grid, pixels[None])[0]
                found = labels[0, pixels[:, 0], pixels[:, 1]]
                for seed in seeds:
                    drawn["upsampled", seed].append((vectors[seed :: config.seeds], found[seed :: config.seeds]))
            if "lowres" in probes:
                cells = F.interpolate(labels[:, None].double(), features.shape[-2:], mode="nearest-exact").long()
                vectors, found = features[0].flatten(1).T, cells.flatten()
                vectors, found = vectors[found >= 0], found[found >= 0]
                for seed in seeds if len(found) else ():
                    chosen = _draw(len(found), min(points, len(found)), generator).to(config.device)
                    drawn["lowres", seed].append((vectors[chosen], found[chosen]))
        if not all(drawn.values()):
            raise self.unlabelled()
        heads: dict[str, list[nn.Linear]] = {probe: [] for probe in probes}
        for (probe, seed), pairs in drawn.items():
            vectors, found = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            heads[probe].append(fit_probe(vectors, found, self.classes, seed=seed))
        return heads

    @torch.no_grad()
    def judge(self, heads: dict[str, list[nn.Linear]]) -> Result:
        flat = [(probe, head) for probe, its_heads in heads.items() for head in its_heads]
        weight = torch.cat([head.weight for _, head in flat])
        bias = torch.cat([head.bias for _, head in flat])
        confusions = [Confusion(self.classes, self.config.boundary) for _ in flat]
        colours = self.dataset.colours or palette(self.classes)
        pictures: list[dict[str, Image.Image]] = []
        chosen = spread(len(self.dataset.val), self.config.pictures)
        for number, (image, features, labels) in enumerate(self.frames(self.dataset.val, "judge")):
            logits = self.logits(image, features, weight, bias)
            predictions = [part.argmax(1) for part in logits.split(self.classes, dim=1)]
            for prediction, confusion in zip(predictions, confusions, strict=True):
                confusion.update(prediction, labels)
            if number in chosen:
                shown = F.interpolate(image, self.config.grid, mode="bilinear", align_corners=False, antialias=True)
                pictures.append(
                    {
                        "image": picture(shown[0]),
                        "truth": label_picture(labels[0], colours),
                        "ours": label_picture(predictions[0][0], colours),
                    }
                )
        metrics: dict[str, list[float]] = {}
        for (probe, _), confusion in zip(flat, confusions, strict=True):
            prefix = "lowres_probe_" if probe == "lowres" else ""
            for name, value in confusion.scores().items():
                metrics.setdefault(prefix + name, []).append(value)
        first = confusions[: self.config.seeds]
        return Result(metrics, {"classes": class_details(self.dataset.classes, first)}, pictures)

    def unlabelled(self) -> ValueError:
        return ValueError(
            f"none of the {len(self.dataset.train)} pictures of {self.dataset.name}'s training split has a labelled "
            "pixel to learn from"
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), bias.to(x.dtype))


def _draw(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices below ``available`` at random, each once before any is repeated."""
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(rounds)[:wanted]
