"""Depth and surface normals from upsampled features (paper section 4, table 2)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...backbones import Backbone
from ...progress import track
from ...train.config.schema import Count, NotNegative, Positive
from ..colour import map_picture, picture
from ..datasets.base import Dataset, GeometrySample
from ..result import Metric, Result
from ..upsamplers.access import at_pixels
from ..upsamplers.registry import Upsampler
from .dpt import DptHead
from .geometry_scores import (
    DEPTH_METRICS,
    NORMALS_METRICS,
    cosine_loss,
    depth_scores,
    normals_scores,
    scale_invariant_log_loss,
)
from .grid import GridConfig, GridTask
from .loops import minimise, seeded_head, walk

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEPTH_METRICS", "NORMALS_METRICS", "GeometryConfig", "depth", "normals"]

NEAREST = 1e-3  # metres: a prediction below is none


@dataclass
class GeometryConfig(GridConfig):
    """Protocol of depth and surface normals, beside the settings of :class:`GridConfig`; the defaults are the paper's.

    Args:
        head: "dpt" trains :class:`loftup.eval.tasks.dpt.DptHead` on whole pictures (AdamW); "linear" solves ridge
            regression of depth in metres, or of the normals' coordinates, on pixels drawn from every picture, in one
            pass over the pictures for all seeds.
        epochs: of "dpt".
        batch: pictures a step, of "dpt".
        rate: learning rate of "dpt".
        hidden: channels of "dpt"; its activations take most of the memory.
        points: pixels drawn from every picture and seed, of "linear".
        ridge: penalty of "linear" on the weights of standardised features, as a share of the samples' number.

    Raises:
        ValueError: a value is none of those named here.
    """

    head: str = "dpt"
    epochs: Count = 10
    batch: Count = 8
    rate: Positive = 5e-4
    hidden: Count = 128
    points: Count = 500
    ridge: NotNegative = 1e-4

    def __post_init__(self) -> None:
        if self.head not in ("dpt", "linear"):
            raise ValueError(f"head must be 'dpt' or 'linear', got {self.head!r}")
        super().__post_init__()
        if min(self.seeds, self.epochs, self.batch, self.points, self.hidden) < 1:
            raise ValueError(f"seeds, epochs, batch, points and hidden must be 1 or more, got {self}")


def depth(
    backbone: Backbone, upsampler: Upsampler, dataset: Dataset[GeometrySample], config: GeometryConfig | None = None
) -> Result:
    """Train heads that predict depth on the training split and judge them on the validation split.

    The "dpt" head predicts log depth and learns by the scale-invariant log loss (Eigen et al. 2014). Scores are made
    picture by picture and averaged over the pictures; pixels and pictures without known depth do not count.

    Returns:
        DEPTH_METRICS, one value a seed; "pictures" in the details; pictures of the first seed.

    Raises:
        ValueError: a split is empty or knows no depth.
    """
    return _Regression(backbone, upsampler, dataset, config or GeometryConfig(), _DEPTH).run()


def normals(
    backbone: Backbone, upsampler: Upsampler, dataset: Dataset[GeometrySample], config: GeometryConfig | None = None
) -> Result:
    """Train heads that predict surface normals on the training split and judge them on the validation split.

    The "dpt" head learns by 1 less the cosine. Otherwise as :func:`depth`, with NORMALS_METRICS.
    """
    return _Regression(backbone, upsampler, dataset, config or GeometryConfig(), _NORMALS).run()


@dataclass(frozen=True)
class _Target:
    """Depth or normals: all in which the two differ."""

    name: str
    outputs: int
    metrics: dict[str, Metric]
    truth: Callable[[GeometrySample], Tensor]  # (outputs, H, W)
    start: Callable[[Tensor], Tensor]  # first prediction of a head, from the truth (N, outputs) of its first batch
    from_dpt: Callable[[Tensor], Tensor]  # output of the head (B, outputs, H, W) to a prediction
    from_linear: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], dict[str, float]]
    picture: Callable[[Tensor, Tensor], "Image.Image"]  # of a map (outputs, H, W) beside the truth


def _depth_picture(values: Tensor, truth: Tensor) -> "Image.Image":
    finite = truth[truth.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return map_picture(values[0], low, high)


def _normals_picture(values: Tensor, truth: Tensor) -> "Image.Image":
    # The usual colours: red to the right, green up, blue towards the camera.
    towards = values * values.new_tensor([1, -1, -1])[:, None, None]
    return picture(((towards + 1) / 2).nan_to_num(0))


_DEPTH = _Target(
    "depth",
    1,
    DEPTH_METRICS,
    lambda sample: sample.depth[None].where(sample.depth > 0, math.nan),
    lambda truth: truth.log().mean(0),
    lambda raw: raw.exp(),
    lambda raw: raw.clamp(min=NEAREST),
    scale_invariant_log_loss,
    depth_scores,
    _depth_picture,
)
_NORMALS = _Target(
    "normal",
    3,
    NORMALS_METRICS,
    lambda sample: sample.normals,
    lambda truth: truth.mean(0),
    lambda raw: F.normalize(raw, dim=1),
    lambda raw: F.normalize(raw, dim=1),
    cosine_loss,
    normals_scores,
    _normals_picture,
)


@dataclass
class _Regression(GridTask):
    config: GeometryConfig
    target: _Target

    def run(self) -> Result:
        self.check_splits()
        if self.config.head == "linear":
            return self.judge(self.solve())
        return self.judge([self.train(seed) for seed in range(self.config.seeds)])

    def truth(self, sample: GeometrySample) -> Tensor:
        return self.target.truth(sample)

    def train(self, seed: int) -> DptHead:
        config = self.config
        head = seeded_head(lambda: DptHead(self.backbone.channels, self.target.outputs, config.hidden), seed)
        head.to(config.device)
        first = True

        def loss(samples: list[GeometrySample]) -> Tensor | None:
            nonlocal first
            image, features, truth = self.load(samples)
            finite = truth.isfinite().all(1)
            if not finite.any():
                return None
            if first:
                _start(head.output, self.target.start(rearrange(truth, "b k h w -> b h w k")[finite]))
                first = False
            output = self.enlarge(head(self.dense(features, image).float()))
            return self.target.loss(self.target.from_dpt(output), truth)

        optimizer = torch.optim.AdamW(head.parameters(), config.rate)
        generator = torch.Generator().manual_seed(seed)
        caption = f"train head {seed + 1}/{config.seeds}"
        if not minimise(loss, self.dataset.train, optimizer, config, generator, caption):
            raise self.unknown("training")
        return head.eval()

    def solve(self) -> nn.Conv2d:
        """All seeds' linear heads in one 1x1 convolution."""
        config, channels = self.config, self.backbone.channels
        generator = torch.Generator().manual_seed(7)
        sums = [_Moments(channels, self.target.outputs) for _ in range(config.seeds)]
        for sample in track(self.dataset.train, "draw pixels", len(self.dataset.train), leave=False):
            image, features, truth = self.load([sample])
            positions = truth[0].isfinite().all(0).nonzero().cpu()
            if not len(positions):
                continue
            draw = torch.randint(len(positions), (config.seeds * config.points,), generator=generator)
            pixels = positions[draw].to(truth.device)
            vectors = at_pixels(self.upsampler, features, image, config.grid, pixels[None])[0]
            values = truth[0][:, pixels[:, 0], pixels[:, 1]].T
            for seed, moments in enumerate(sums):
                moments.add(vectors[seed :: config.seeds], values[seed :: config.seeds])
        if not sums[0].count:
            raise self.unknown("training")
        weights, biases = zip(*(moments.solve(config.ridge) for moments in sums), strict=True)
        head: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels, config.seeds * self.target.outputs, 1)
        with torch.no_grad():
            head.weight.copy_(torch.cat(weights)[:, :, None, None])
            head.bias.copy_(torch.cat(biases))  # type: ignore[union-attr]
        return head.to(config.device)

    def predictions(self, image: Tensor, features: Tensor, heads: "list[DptHead] | nn.Conv2d") -> list[Tensor]:
        """(outputs, H', W') of every seed, of one picture."""
        if isinstance(heads, nn.Conv2d):
            outputs = self.predict(heads, features, image).split(self.target.outputs, 1)
            return [self.target.from_linear(output)[0] for output in outputs]
        dense = self.dense(features, image).float()
        return [self.target.from_dpt(self.enlarge(head(dense)))[0] for head in heads]

    @torch.no_grad()
    def judge(self, heads: "list[DptHead] | nn.Conv2d") -> Result:
        scores: list[list[dict[str, float]]] = [[] for _ in range(self.config.seeds)]
        details: dict[str, dict[str, float]] = {}
        pictures: list[dict[str, Image.Image]] = []
        for sample, show in walk(self.dataset.val, "judge", self.config.pictures):
            image, features, truth = self.load([sample])
            predictions = self.predictions(image, features, heads)
            finite = truth[0].isfinite().all(0)
            if finite.any():
                rows = [self.target.scores(each[:, finite], truth[0][:, finite]) for each in predictions]
                for row, its_scores in zip(rows, scores, strict=True):
                    its_scores.append(row)
                details[sample.name] = {name: fmean(row[name] for row in rows) for name in self.target.metrics}
            if show:
                expected, ours = (self.target.picture(each, truth[0]) for each in (truth[0], predictions[0]))
                pictures.append({"image": self.thumbnail(image), "truth": expected, "ours": ours})
        if not details:
            raise self.unknown("validation")
        metrics = {name: [fmean(row[name] for row in rows) for rows in scores] for name in self.target.metrics}
        return Result(metrics, {"pictures": details}, pictures)

    def unknown(self, split: str) -> ValueError:
        return ValueError(f"no picture of {self.dataset.name}'s {split} split has a pixel of known {self.target.name}")


@torch.no_grad()
def _start(output: nn.Conv2d, value: Tensor) -> None:
    """Let a head predict one value everywhere: a scale far off would take most of a short training to correct."""
    output.weight.zero_()
    output.bias.copy_(value)  # type: ignore[union-attr]


class _Moments:
    """Sums for least squares, in float64: samples are seen once and not kept."""

    def __init__(self, channels: int, outputs: int) -> None:
        self.count = 0
        self.inputs = torch.zeros(channels, dtype=torch.float64)
        self.outputs = torch.zeros(outputs, dtype=torch.float64)
        self.squares = torch.zeros(channels, channels, dtype=torch.float64)
        self.products = torch.zeros(channels, outputs, dtype=torch.float64)

    def add(self, features: Tensor, values: Tensor) -> None:
        """Features (N, C) and values (N, outputs)."""
        x, y = features.cpu().double(), values.cpu().double()
        self.count += len(x)
        self.inputs += x.sum(0)
        self.outputs += y.sum(0)
        self.squares += x.T @ x
        self.products += x.T @ y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (outputs, C) and bias (outputs,) of ridge regression on standardised features."""
        mean, target = self.inputs / self.count, self.outputs / self.count
        covariance = self.squares / self.count - mean[:, None] * mean
        variance = covariance.diagonal()
        # What never varies must not be blown up: its weight becomes 0.
        varies = variance > 1e-9 * self.squares.diagonal() / self.count
        scale = variance.clamp(min=1e-300).sqrt().where(varies, math.inf)
        system = covariance / scale[:, None] / scale + ridge * torch.eye(len(mean), dtype=torch.float64)
        right = (self.products / self.count - mean[:, None] * target) / scale[:, None]
        weight = (torch.linalg.solve(system, right) / scale[:, None]).T
        return weight.float(), (target - weight @ mean).float()
