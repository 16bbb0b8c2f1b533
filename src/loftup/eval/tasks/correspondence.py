"""Semantic correspondence: points of a picture found in another by their features alone (PCK)."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...backbones import Backbone
from ...drawing import matches
from ...matching import QUERIES, likeness, most_alike, rescaled
from ...train.config.schema import Count, Positive, PositiveShare, Section, Whole
from ..colour import picture
from ..datasets.base import CorrespondenceSample, Dataset, Samples
from ..datasets.prepare import in_proportion, to_float
from ..features import recall
from ..result import Metric, Result, spread
from ..upsamplers.access import at_points, with_head
from ..upsamplers.registry import Upsampler
from .loops import walk

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "CorrespondenceConfig", "correspondence"]

ALPHAS = (0.2, 0.15, 0.1, 0.05, 0.02, 0.01)
METRICS = {
    **{f"pck_{alpha}": Metric(f"PCK@{alpha} %", 2) for alpha in ALPHAS},
    **{f"image_pck_{alpha}": Metric(f"PCK@{alpha} per image %", 2) for alpha in ALPHAS},
    "mutual": Metric("mutual %"),
    **{f"mutual_pck_{alpha}": Metric(f"PCK@{alpha} of mutual %", 2) for alpha in ALPHAS},
}
SHOWN = 224  # pixels of the height of a picture's panels


@dataclass
class CorrespondenceConfig(Section):
    """Protocol of the search; the paper has no such task, so the defaults are what is usual on SPair-71k.

    Args:
        size: shorter side that both pictures are scaled to, in proportion; the longer becomes the nearest multiple of
            the backbone's patch size.
        output: share of ``size`` at which features are upsampled and matched. An upsampler with ``native`` keeps the
            backbone's grid, and finds the centres of cells.
        alphas: tolerances that are reported, of 0.2, 0.15, 0.1, 0.05, 0.02 and 0.01: a point is right if it lies within
            that share of the longer side of what ``tolerance`` says.
        tolerance: "box" for the object's box in the target, and the picture where there is none, or "image".
        within_box: whether points are looked for in the object's box alone; usually in the whole target.
        pairs: how many to judge, evenly spread; 0 for all.
        pictures: pairs to show, evenly spread.
        device: to compute on.

    Raises:
        ValueError: an alpha is none of these.
    """

    size: Count = 448
    output: PositiveShare = 1.0
    alphas: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [0.1, 0.05, 0.01])
    tolerance: Literal["box", "image"] = "box"
    within_box: bool = False
    pairs: Whole = 0
    pictures: Whole = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.alphas or not set(self.alphas) <= set(ALPHAS):
            raise ValueError(f"alphas must be some of {', '.join(map(str, ALPHAS))}, got {self.alphas}")


@dataclass(frozen=True)
class _Outcome:
    """Where the points of a pair were found."""

    found: Tensor  # (N, 2) float32, in pixels of the target
    errors: Tensor  # (N,) float32, distances from the truth as shares of the tolerance's side
    mutual: Tensor  # (N,) bool


def correspondence(
    backbone: Backbone,
    upsampler: Upsampler,
    dataset: Dataset[CorrespondenceSample],
    config: CorrespondenceConfig | None = None,
) -> Result:
    """Find every source point in the target: the pixel whose feature has the greatest cosine with the point's.

    The percentage of correct keypoints (Yang & Ramanan, 2013) is reported in both ways that papers do: over all points,
    and as the mean over the pairs of every pair's own ("per image"). A match is mutual if the way back, from the pixel
    that was found to the source, ends within a cell of the backbone's grid of where it began: which share is, and the
    PCK of these alone. Nothing is learned or random. Maps of features are not held where the upsampler streams.

    Returns:
        The metrics of METRICS in percent, those of ``config.alphas``, one value each; PCK of every pair in the details'
        "pairs", and of every category, with the number of its points, in "categories".

    Raises:
        ValueError: there is no pair.
    """
    config = config or CorrespondenceConfig()
    samples = dataset.val
    if not len(samples):
        raise ValueError(f"{dataset.name} has no pairs to judge by")
    if 0 < config.pairs < len(samples):
        samples = Samples(sorted(spread(len(samples), config.pairs)), samples.__getitem__)
    names: list[tuple[str, str]] = []
    outcomes: list[_Outcome] = []
    pictures: list[dict[str, Image.Image]] = []
    for sample, show in walk(samples, "pairs", config.pictures):
        outcome = _judge(backbone, upsampler, sample, config)
        names.append((sample.name, sample.category))
        outcomes.append(outcome)
        if show:
            pictures.append(_pictures(sample, outcome, max(config.alphas)))
    details = {"pairs": {name: _pck([one], config) for (name, _), one in zip(names, outcomes, strict=True)}}
    groups: dict[str, list[_Outcome]] = {}
    for (_, category), outcome in zip(names, outcomes, strict=True):
        groups.setdefault(category, []).append(outcome)
    if groups.keys() != {""}:
        details["categories"] = {
            category: {"points": float(sum(len(one.errors) for one in group)), **_pck(group, config)}
            for category, group in sorted(groups.items())
        }
    numbers = _pck(outcomes, config)
    for alpha in config.alphas:
        numbers[f"image_pck_{alpha}"] = fmean(_share(one.errors <= alpha) for one in outcomes)
    numbers["mutual"] = _share(torch.cat([one.mutual for one in outcomes]))
    if numbers["mutual"]:
        sure = torch.cat([one.errors[one.mutual] for one in outcomes])
        numbers |= {f"mutual_pck_{alpha}": _share(sure <= alpha) for alpha in config.alphas}
    return Result({name: [value] for name, value in numbers.items()}, details, pictures)


def _share(right: Tensor) -> float:
    """Percentage of what is true."""
    return 100 * float(right.double().mean())


def _pck(outcomes: list[_Outcome], config: CorrespondenceConfig) -> dict[str, float]:
    errors = torch.cat([one.errors for one in outcomes])
    return {f"pck_{alpha}": _share(errors <= alpha) for alpha in config.alphas}


@torch.no_grad()
def _judge(
    backbone: Backbone, upsampler: Upsampler, sample: CorrespondenceSample, config: CorrespondenceConfig
) -> _Outcome:
    source, target = (_View(backbone, upsampler, image, config) for image in (sample.source, sample.target))
    starts = source.place(sample.source_points)
    places = target.find(source.vectors(starts), sample.target_box if config.within_box else None)
    back = source.find(target.vectors(places))
    mutual = ((back - starts).abs() <= source.cell).all(1).cpu()
    found = target.unplace(places).cpu()
    box = sample.target_box if config.tolerance == "box" else None
    side = max(sample.target.shape[1:]) if box is None else max(box[2] - box[0], box[3] - box[1])
    return _Outcome(found, (found - sample.target_points).norm(dim=1) / side, mutual)


class _View:
    """A picture with its features; points are (x, y) in pixels of the grid ``size`` unless it says otherwise."""

    def __init__(self, backbone: Backbone, upsampler: Upsampler, image: Tensor, config: CorrespondenceConfig) -> None:
        self.upsampler = upsampler
        self.whole = image.shape[1], image.shape[2]
        self.image = in_proportion(image, config.size, backbone.patch_size).to(config.device)
        self.features = recall(backbone, self.image)
        grid = self.features.shape[2], self.features.shape[3]
        self.native = bool(getattr(upsampler, "native", False))
        height, width = (max(1, round(side * config.output)) for side in self.image.shape[2:])
        self.size = grid if self.native else (height, width)
        self.cell = torch.tensor([self.size[1] / grid[1], self.size[0] / grid[0]], device=self.features.device)

    def place(self, points: Tensor) -> Tensor:
        """Points of the picture on the grid, those of a native upsampler in the middle of their cells."""
        placed = rescaled(points.to(self.features.device), self.whole, self.size)
        return placed.round() if self.native else placed

    def unplace(self, points: Tensor) -> Tensor:
        """Points of the grid in pixels of the picture."""
        return rescaled(points, self.size, self.whole)

    def vectors(self, points: Tensor) -> Tensor:
        """(N, C)."""
        return at_points(self.upsampler, self.features, self.image, self.size, points)

    def find(self, vectors: Tensor, box: tuple[float, float, float, float] | None = None) -> Tensor:
        """The pixel (N, 2) most like every vector (N, C), in a box of the picture if there is one."""
        outside = torch.zeros(self.size, dtype=torch.bool, device=vectors.device)
        if box is not None:
            corners = rescaled(torch.tensor(box).view(2, 2), self.whole, self.size)
            (left, top), (right, bottom) = corners.round().long().tolist()
            outside[:] = True
            outside[top : bottom + 1, left : right + 1] = False
        places = []
        for some in vectors.split(QUERIES):
            similarity = with_head(self.upsampler, self.features, self.image, self.size, likeness(some))[0]
            places.append(most_alike(similarity.masked_fill(outside, -math.inf))[0])
        return torch.cat(places)


def _pictures(sample: CorrespondenceSample, outcome: _Outcome, alpha: float) -> "dict[str, Image.Image]":
    """The two pictures, one below the other: as they are, with the truth, and with what was found."""
    first, second = picture(to_float(sample.source)), picture(to_float(sample.target))
    right, none = outcome.errors <= alpha, outcome.found[:0]

    def drawn(points: Tensor, targets: Tensor, correct: Tensor | None) -> "Image.Image":
        return matches(first, second, points, targets, correct=correct, stacked=True, height=SHOWN)

    return {
        "image": drawn(none, none, None),
        "truth": drawn(sample.source_points, sample.target_points, torch.ones_like(right)),
        "ours": drawn(sample.source_points, outcome.found, right),
    }
