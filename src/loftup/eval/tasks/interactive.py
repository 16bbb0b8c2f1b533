"""Interactive segmentation: an object from a click (paper section 4, table 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import LoftUpError
from ...progress import track
from ...train.config.schema import Count, Positive, Whole
from ..colour import overlay, picture
from ..datasets import open_dataset
from ..datasets.base import Dataset, InteractiveSample, Samples
from ..datasets.prepare import to_float
from ..features import recall
from ..result import Metric, Result, spread
from ..upsamplers.registry import Upsampler
from .clicks import Click, click_maps, first_click, inside_click, next_click, similarity_maps
from .davis_metrics import jaccard
from .grid import GridConfig
from .loops import minimise, seeded_head, walk
from .similarity_head import SimilarityHead, ThresholdFit

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "ClickHead", "InteractiveConfig", "interactive", "normalised_focal_loss"]

MOST_CLICKS = 20
METRICS = {f"iou_at_{n}": Metric(f"IoU@{n} %", 2) for n in range(1, MOST_CLICKS + 1)}
OBJECT = ((0, 0, 0), (250, 200, 40))
CLICK = {True: (0.2, 0.8, 0.2), False: (0.9, 0.2, 0.2)}


@dataclass
class InteractiveConfig(GridConfig):
    """Protocol of interactive segmentation, beside the settings of :class:`GridConfig`; the defaults are the paper's.

    Args:
        size: [height, width] that whole pictures are scaled to, as cutting would lose objects.
        output: share of ``size`` at which features are upsampled and masks made; they are judged in the picture's own.
        clicks: to judge after, 1 to 20. The first is the object's pixel farthest from its boundary; each further one is
            in the middle of the largest error.
        head: "convolutions" trains :class:`ClickHead`; "similarity" selects what is like the clicked pixel
            (:class:`~loftup.eval.tasks.similarity_head.SimilarityHead`), and learns its threshold alone, in one pass
            over the training split for all seeds, which differ in the clicks.
        similarity: whether the click encoder sees how similar every pixel is to the clicked one.
        radius: of a click's disc, in pixels of the upsampled features.
        hidden: channels of the head.
        train: dataset to learn from, "NAME:PATH", for one without a training split; the paper's is "sbd:PATH".
        objects: of the training split to learn from, evenly spread; 0 for all.
        epochs: passes over the training split.
        batch: objects a step.
        rate: learning rate of Adam.

    Raises:
        ValueError: a value is none of those named here.
    """

    clicks: Count = 1
    head: str = "convolutions"
    similarity: bool = True
    radius: Positive = 5.0
    hidden: Count = 64
    train: str = ""
    objects: Whole = 0
    epochs: Count = 20
    batch: Count = 8
    rate: Positive = 5e-5

    def __post_init__(self) -> None:
        if not 1 <= self.clicks <= MOST_CLICKS:
            raise ValueError(f"clicks must be 1 to {MOST_CLICKS}, got {self.clicks}")
        if self.head not in ("convolutions", "similarity"):
            raise ValueError(f"head must be 'convolutions' or 'similarity', got {self.head!r}")
        super().__post_init__()
        if min(self.seeds, self.epochs, self.batch, self.hidden) < 1:
            raise ValueError(f"seeds, epochs, batch and hidden must be 1 or more, got {self}")


class ClickHead(nn.Module):
    """Features and clicks to the logits of a mask.

    A 1x1 projection of the standardised features and a click encoder of one 3x3 convolution are added; three
    convolutions follow. The paper says no more of its click encoder than that it is one layer; what it sees here is our
    choice: discs, decays with the distance (:func:`~loftup.eval.tasks.clicks.click_maps`), and the similarity to the
    clicked pixel (:func:`~loftup.eval.tasks.clicks.similarity_maps`). Without the similarity a head of so few
    convolutions cannot tell the clicked object from its like beyond a few pixels.

    Args:
        channels: C of the features.
        hidden: channels of the head.
        radius: of a click's disc in pixels.
        similarity: whether the click encoder sees the similarity.
    """

    def __init__(self, channels: int, hidden: int = 64, radius: float = 5.0, similarity: bool = True) -> None:
        super().__init__()
        self.radius = radius
        self.similarity = similarity
        self.standardise = nn.BatchNorm2d(channels, momentum=None, affine=False)
        self.project = nn.Conv2d(channels, hidden, 1)
        self.encode = nn.Conv2d(6 if similarity else 4, hidden, 3, padding=1)
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, features: Tensor, clicks: Sequence[list[Click]]) -> Tensor:
        """Features (B, C, n, m) and every picture's clicks in pixels of that grid to logits (B, n, m)."""
        features = self.standardise(features)
        size = (features.shape[2], features.shape[3])
        maps = torch.stack([click_maps(each, size, self.radius) for each in clicks]).to(features)
        if self.similarity:
            alike = [similarity_maps(each, its_clicks) for each, its_clicks in zip(features, clicks, strict=True)]
            maps = torch.cat([maps, torch.stack(alike)], 1)
        logits: Tensor = self.head(self.project(features) + self.encode(maps))
        return rearrange(logits, "b 1 h w -> b h w")


def normalised_focal_loss(logits: Tensor, truth: Tensor, alpha: float = 0.5, gamma: float = 2.0) -> Tensor:
    """Cross-entropy weighted by (1 - p)^gamma, the weights scaled to sum to 1 (Sofiiuk et al. 2019), times alpha.

    Args:
        logits: (B, H, W).
        truth: (B, H, W) int64: 1 object, 0 not, -1 not to count.
        alpha: factor of the object's pixels; the others' is 1 - alpha.
        gamma: exponent.

    Returns:
        The mean over the pictures; no gradient flows through the sum of the weights.
    """
    counted, positive = truth >= 0, truth == 1
    log_p = F.logsigmoid(torch.where(positive, logits, -logits))
    weights = (1 - log_p.exp()) ** gamma * counted
    total = weights.detach().flatten(1).sum(1).clamp(min=1e-12)
    factor = torch.where(positive, alpha, 1 - alpha)
    return ((-factor * weights * log_p).flatten(1).sum(1) / total).mean()


def interactive(
    backbone: Backbone,
    upsampler: Upsampler,
    dataset: Dataset[InteractiveSample],
    config: InteractiveConfig | None = None,
) -> Result:
    """Train heads that find the clicked object, and judge the masks after each click of a simulated user.

    In training the first click is anywhere well inside the object; with ``config.clicks`` above 1 a random number of
    further ones corrects the head's own errors, as in judging.

    Returns:
        "iou_at_1" to the number of clicks, in percent and averaged over the objects, one value a seed; "samples" in the
        details; pictures of the first seed after the last click.

    Raises:
        LoftUpError: there is no training split and ``config.train`` names none, or a mask is empty; SciPy is missing.
        ValueError: there is no validation split.
    """
    config = config or InteractiveConfig()
    if not len(dataset.val):
        raise ValueError(f"{dataset.name} has no validation pictures")
    samples = open_dataset(config.train, "interactive").train if config.train else dataset.train
    if not len(samples):
        raise LoftUpError(
            f"{config.train or dataset.name} has no training split; give one that has as train, such as sbd:FOLDER"
        )
    if config.objects:
        samples = Samples(sorted(spread(len(samples), config.objects)), samples.__getitem__)
    selection = Selection(backbone, upsampler, config)
    if config.head == "similarity":
        return selection.judge(dataset.val, selection.fit(samples))
    return selection.judge(dataset.val, [selection.train(samples, seed) for seed in range(config.seeds)])


@dataclass
class Selection:
    """Training and judging of click heads; the methods are the steps of :func:`interactive`."""

    backbone: Backbone
    upsampler: Upsampler
    config: InteractiveConfig

    def load(self, samples: Sequence[InteractiveSample]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and upsampled features (B, C, H', W')."""
        image = torch.stack([_resized(to_float(sample.image), self.config.size) for sample in samples])
        image = image.to(self.config.device)
        with torch.no_grad():
            return image, self.upsampler(recall(self.backbone, image), image, self.config.grid).float()

    def train(self, samples: Sequence[InteractiveSample], seed: int) -> ClickHead:
        """A head trained on all samples."""
        config = self.config
        head = seeded_head(
            lambda: ClickHead(self.backbone.channels, config.hidden, config.radius, config.similarity), seed
        ).to(config.device)
        generator = torch.Generator().manual_seed(seed)

        def loss(batch: list[InteractiveSample]) -> Tensor:
            _, features = self.load(batch)
            masks, clicks = zip(*(self.pose(sample, generator) for sample in batch), strict=True)
            truth = torch.stack(masks)
            for _ in range(int(torch.randint(config.clicks, (), generator=generator))):
                self.correct(head, features, truth, clicks)
            return normalised_focal_loss(head(features, clicks), truth.to(config.device))

        optimizer = torch.optim.Adam(head.parameters(), config.rate)
        minimise(loss, samples, optimizer, config, generator, f"train head {seed + 1}/{config.seeds}")
        return head.eval()

    def fit(self, samples: Sequence[InteractiveSample]) -> list[SimilarityHead]:
        """Heads of all seeds that only know a threshold."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.config.seeds)]
        fits = [ThresholdFit() for _ in generators]
        for sample in track(samples, "fit thresholds", len(samples), leave=False):
            _, features = self.load([sample])
            for generator, fit in zip(generators, fits, strict=True):
                mask, clicks = self.pose(sample, generator)
                fit.add(similarity_maps(features[0], clicks)[0], mask)
        return [SimilarityHead(fit.best()) for fit in fits]

    def pose(self, sample: InteractiveSample, generator: torch.Generator) -> tuple[Tensor, list[Click]]:
        """The mask of an object at the size of the features, and a click well inside it."""
        mask = sample.mask
        click = inside_click(_object(sample), generator).scaled((mask.shape[0], mask.shape[1]), self.config.grid)
        small = F.interpolate(mask[None, None].float(), self.config.grid, mode="nearest-exact")[0, 0].long()
        # An object may fall between the pixels of the smaller grid; where it was clicked it is.
        small[click.row, click.column] = 1
        return small, [click]

    @torch.no_grad()
    def correct(self, head: ClickHead, features: Tensor, truth: Tensor, clicks: Sequence[list[Click]]) -> None:
        """Add to every sample's clicks the one that corrects the head's error."""
        head.eval()
        predictions = (head(features, clicks) > 0).cpu()
        head.train()
        for prediction, mask, its_clicks in zip(predictions, truth, clicks, strict=True):
            click = next_click(prediction, mask, its_clicks)
            its_clicks += [click] if click else []

    @torch.no_grad()
    def judge(self, samples: Sequence[InteractiveSample], heads: Sequence[nn.Module]) -> Result:
        """IoU of every head after each click, over all samples."""
        names = list(METRICS)[: self.config.clicks]
        metrics: dict[str, list[list[float]]] = {name: [[] for _ in heads] for name in names}
        details: dict[str, dict[str, float]] = {}
        pictures: list[dict[str, Image.Image]] = []
        for sample, show in walk(samples, "judge", self.config.pictures):
            image, features = self.load([sample])
            runs = [self.use(head, features, sample) for head in heads]
            for seed, (ious, _, _) in enumerate(runs):
                for name, iou in zip(names, ious, strict=True):
                    metrics[name][seed].append(iou)
            details[sample.name] = {name: fmean(values[-1] for values in metrics[name]) for name in names}
            if show:
                pictures.append(self.show(image[0].cpu(), sample, *runs[0][1:]))
        means = {name: [fmean(values) for values in seeds] for name, seeds in metrics.items()}
        return Result(means, {"samples": details}, pictures)

    def use(
        self, head: nn.Module, features: Tensor, sample: InteractiveSample
    ) -> tuple[list[float], Tensor, list[Click]]:
        """IoU in percent after each click, the last mask (H, W) bool and all clicks, in pixels of the picture."""
        size = (sample.mask.shape[0], sample.mask.shape[1])
        clicks, ious = [first_click(_object(sample))], []
        for _ in range(self.config.clicks):
            logits = head(features, [[click.scaled(size, self.config.grid) for click in clicks]])
            large = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0, 0]
            prediction = (large > 0).cpu()
            ious.append(100 * jaccard(prediction, sample.mask == 1, sample.mask < 0))
            click = next_click(prediction, sample.mask, clicks) if len(ious) < self.config.clicks else None
            clicks += [click] if click else []
        return ious, prediction, clicks

    def show(
        self, image: Tensor, sample: InteractiveSample, prediction: Tensor, clicks: list[Click]
    ) -> "dict[str, Image.Image]":
        """The row of the figure: clicks on the image, the mask to find and the mask of the head."""
        size = (image.shape[1], image.shape[2])
        canvas = image.clone()
        for click in clicks:
            at = click.scaled((sample.mask.shape[0], sample.mask.shape[1]), size)
            for radius, colour in ((min(size) / 40, (1.0, 1.0, 1.0)), (min(size) / 60, CLICK[click.positive])):
                disc = click_maps([Click(at.row, at.column)], size, radius)[0] > 0
                canvas[:, disc] = torch.tensor(colour)[:, None]
        masks = (
            F.interpolate(x[None, None].float(), size, mode="nearest-exact")[0, 0].long()
            for x in (sample.mask, prediction)
        )
        truth, ours = (picture(overlay(image, mask, OBJECT)) for mask in masks)
        return {"image": picture(canvas), "truth": truth, "ours": ours}


def _object(sample: InteractiveSample) -> Tensor:
    mask = sample.mask == 1
    if not mask.any():
        raise LoftUpError(f"the mask of {sample.name} is empty: there is no object to click on; leave it out")
    return mask


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    if list(image.shape[1:]) == list(size):
        return image
    return F.interpolate(image[None], list(size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
