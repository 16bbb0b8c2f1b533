"""Video object segmentation by label propagation (paper section 4, table 3; protocol of DINO, Caron et al. 2021)."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ...backbones import Backbone
from ...progress import track
from ...train.config.schema import Count, Positive, Section, Whole
from ..colour import overlay, palette, picture
from ..datasets.base import Dataset, VideoSequence
from ..datasets.prepare import in_proportion, to_float
from ..features import recall
from ..result import Metric, Result
from ..upsamplers.registry import Upsampler
from .davis_metrics import boundary_f, jaccard, object_statistics
from .loops import walk

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "VideoConfig", "propagate", "video"]

METRICS = {
    "j_and_f": Metric("J&F"),
    "j": Metric("J"),
    "f": Metric("F"),
    "j_recall": Metric("J recall %"),
    "f_recall": Metric("F recall %"),
    "j_decay": Metric("J decay", higher_is_better=False),
    "f_decay": Metric("F decay", higher_is_better=False),
}
TILE = 16  # cells of a side of what is propagated at once


@dataclass
class VideoConfig(Section):
    """Protocol of label propagation; the defaults are the paper's, and DINO's where it does not say.

    Args:
        size: shorter side that frames are scaled to, in proportion; the longer becomes the nearest multiple of the
            backbone's patch size.
        feature_size: shorter side of the grid that features are upsampled to and labels propagated on. An upsampler
            with ``native`` keeps the backbone's grid.
        context: frames before the current one that labels come from, besides the first.
        radius: of the square window around a cell that it gets labels from, in cells of the grid.
        top: cells that give their labels, the most similar ones of all context frames.
        temperature: of the softmax over their cosine similarities.
        stretch: whether every label's map is stretched to [0, 1] before they are compared, as DINO does.
        pictures: sequences to show, evenly spread, by their middle frame.
        device: to compute on.

    Raises:
        ValueError: a value is not positive.
    """

    size: Count = 224
    feature_size: Count = 112
    context: Whole = 7
    radius: Count = 12
    top: Count = 5
    temperature: Positive = 0.1
    stretch: bool = True
    pictures: Whole = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive = ("size", "feature_size", "radius", "top", "temperature")
        wrong = {name: getattr(self, name) for name in positive if getattr(self, name) <= 0}
        if wrong or self.context < 0:
            raise ValueError(f"{', '.join(positive)} must be positive and context 0 or more, got {self}")


def video(
    backbone: Backbone, upsampler: Upsampler, dataset: Dataset[VideoSequence], config: VideoConfig | None = None
) -> Result:
    """Follow the objects of every sequence's first frame through it, by the similarity of features alone.

    J and F are means over the frames but the first and the last, as in the official semi-supervised evaluation, and
    over the objects of all sequences. Only the context's features are held in memory.

    Returns:
        The metrics of METRICS in percent, one value each as nothing is learned or random; "sequences" in the details.

    Raises:
        ValueError: there is no sequence; one has fewer than 3 frames or no object in its first.
    """
    config = config or VideoConfig()
    if not len(dataset.val):
        raise ValueError(f"{dataset.name} has no validation sequences")
    objects: list[dict[str, float]] = []
    details: dict[str, dict[str, float]] = {}
    pictures: list[dict[str, Image.Image]] = []
    for sequence, show in walk(dataset.val, "sequences", config.pictures):
        rows, (image, truth, prediction) = _follow(backbone, upsampler, sequence, config)
        objects += rows
        details[sequence.name] = {name: fmean(row[name] for row in rows) for name in ("j_and_f", "j", "f")}
        if show:
            colours = palette(1 + max(int(truth.max()), int(prediction.max())))
            overlays = (picture(overlay(image, labels, colours)) for labels in (truth, prediction))
            pictures.append(dict(zip(("image", "truth", "ours"), (picture(image), *overlays), strict=True)))
    metrics = {name: [fmean(row[name] for row in objects)] for name in METRICS}
    return Result(metrics, {"sequences": details}, pictures)


@torch.no_grad()
def propagate(
    backbone: Backbone, upsampler: Upsampler, sequence: VideoSequence, config: VideoConfig
) -> Iterator[Tensor]:
    """Labels (H, W) int64 of every frame of a sequence after the first, in the annotations' size."""
    truth = sequence.annotation(0)
    labels = int(truth.max()) + 1
    first = _features(backbone, upsampler, sequence.frame(0), config)
    # What is not judged, -1, belongs to no label and gives none.
    one_hot = (truth[None] == torch.arange(labels)[:, None, None]).float().to(first.device)
    start = first, F.interpolate(one_hot[None], first.shape[1:], mode="nearest-exact")[0]
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.context)
    for index in range(1, len(sequence)):
        features = _features(backbone, upsampler, sequence.frame(index), config)
        masks = _vote(features, [start, *recent], config)
        recent.append((features, masks))
        large = F.interpolate(masks[None], truth.shape, mode="bilinear", align_corners=False)[0]
        if config.stretch:
            low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
            # A label that is nowhere stays at 0.
            large = torch.where(high > 0, (large - low) / (high - low).clamp(min=1e-12), large)
        yield large.argmax(0).cpu()


def _features(backbone: Backbone, upsampler: Upsampler, frame: Tensor, config: VideoConfig) -> Tensor:
    """Features (C, n, m) of length 1 of a frame (3, H, W) uint8."""
    image = in_proportion(frame, config.size, backbone.patch_size).to(config.device)
    features = recall(backbone, image)
    if not getattr(upsampler, "native", False):
        height, width = (max(1, round(side * config.feature_size / config.size)) for side in image.shape[-2:])
        features = upsampler(features, image, (height, width)).float()
    return F.normalize(features[0], dim=0)


def _vote(features: Tensor, context: list[tuple[Tensor, Tensor]], config: VideoConfig) -> Tensor:
    """Masks (K, n, m) of features (C, n, m) from context frames' features and masks.

    The grid is cut into tiles: each compares with its surroundings alone, and what is beyond the window is masked.
    """
    _, height, width = features.shape
    votes = features.new_empty(len(context[0][1]), height, width)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            rows, columns = _span(top, TILE, height), _span(left, TILE, width)
            near_rows = _span(top - config.radius, TILE + 2 * config.radius, height)
            near_columns = _span(left - config.radius, TILE + 2 * config.radius, width)
            keys, values = (
                rearrange([each[:, near_rows, near_columns] for each in maps], "t c n m -> c (t n m)")
                for maps in zip(*context, strict=True)
            )
            similarity = rearrange(features[:, rows, columns], "c n m -> (n m) c") @ keys
            down = (_indices(rows)[:, None] - _indices(near_rows)).abs() <= config.radius
            across = (_indices(columns)[:, None] - _indices(near_columns)).abs() <= config.radius
            within = rearrange(down, "n i -> n 1 i 1") & rearrange(across, "m j -> 1 m 1 j")
            within = repeat(within, "n m i j -> (n m) (t i j)", t=len(context)).to(features.device)
            # Cells that are not judged have no label to give.
            allowed = within & (values.sum(0) > 0)
            similarity = similarity.masked_fill(~allowed, -math.inf)
            best, where = similarity.topk(min(config.top, similarity.shape[1]), dim=1)
            # Where no cell gives a label there is none.
            weights = (best / config.temperature).softmax(1).nan_to_num(0)
            share = (values[:, where] * weights).sum(-1)
            votes[:, rows, columns] = rearrange(share, "k (n m) -> k n m", n=rows.stop - rows.start)
    return votes


def _span(start: int, length: int, limit: int) -> slice:
    return slice(max(0, start), min(limit, start + length))


def _indices(span: slice) -> Tensor:
    return torch.arange(span.start, span.stop)


def _follow(
    backbone: Backbone, upsampler: Upsampler, sequence: VideoSequence, config: VideoConfig
) -> tuple[list[dict[str, float]], tuple[Tensor, Tensor, Tensor]]:
    """Values in percent of every object of a sequence; image, truth and prediction of its middle frame."""
    first, last = sequence.annotation(0), len(sequence) - 1
    if last < 2 or first.max() < 1:
        raise ValueError(
            f"the sequence {sequence.name} has {len(sequence)} frames and {max(0, int(first.max()))} objects in the "
            "first; expected at least 3 frames and an object"
        )
    numbers = range(1, int(first.max()) + 1)
    scores: dict[str, list[list[float]]] = {name: [[] for _ in numbers] for name in "jf"}
    frames = track(propagate(backbone, upsampler, sequence, config), sequence.name, last, leave=False)
    for index, prediction in enumerate(frames, start=1):
        truth = sequence.annotation(index)
        if index == len(sequence) // 2:
            middle = to_float(sequence.frame(index)), truth, prediction
        if index == last:
            continue
        for number in numbers:
            masks = prediction == number, truth == number, truth < 0
            scores["j"][number - 1].append(jaccard(*masks))
            scores["f"][number - 1].append(boundary_f(*masks))
    rows = []
    for j, f in zip(*([object_statistics(values) for values in scores[name]] for name in "jf"), strict=True):
        row = {"j_and_f": (j.mean + f.mean) / 2}
        for name, values in (("j", j), ("f", f)):
            row |= {name: values.mean, f"{name}_recall": values.recall, f"{name}_decay": values.decay}
        rows.append({name: 100 * value for name, value in row.items()})
    return rows, middle
