"""Tasks that predict on a grid of upsampled features: sizes, samples, and heads before and behind the upsampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...train.config.schema import Count, PositiveShare, Section, Sides, Whole
from ..colour import picture
from ..datasets.base import Dataset
from ..datasets.prepare import fit
from ..features import recall
from ..upsamplers.access import with_head
from ..upsamplers.registry import Upsampler

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["GridConfig", "GridTask"]


@dataclass
class GridConfig(Section):
    """Settings of every protocol that predicts on a grid.

    Args:
        size: [height, width] that pictures are scaled to cover and cut to.
        output: share of ``size`` at which features are upsampled and judged.
        seeds: heads to train, each with its own initial weights, order and draws.
        pictures: of the validation split, to show, evenly spread.
        device: to compute on.

    Raises:
        ValueError: ``size`` is no pair of positive numbers, or ``output`` is not in (0, 1].
    """

    size: Sides = field(default_factory=lambda: [224, 224])
    output: PositiveShare = 1.0
    seeds: Count = 3
    pictures: Whole = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1 or not 0 < self.output <= 1:
            raise ValueError(f"size must be [height, width] and output in (0, 1], got {self.size} and {self.output}")

    @property
    def grid(self) -> tuple[int, int]:
        """(H', W') of the upsampled features."""
        return max(1, round(self.size[0] * self.output)), max(1, round(self.size[1] * self.output))


@dataclass
class GridTask:
    """A backbone, an upsampler and a dataset of pictures with a map of the truth.

    Where the upsampler is ``native``, heads see the backbone's own grid, and their predictions are enlarged.
    """

    backbone: Backbone
    upsampler: Upsampler
    dataset: Dataset[Any]
    config: Any  # a GridConfig with settings of its own

    def check_splits(self) -> None:
        """Raise ValueError if a split is empty."""
        train, val = len(self.dataset.train), len(self.dataset.val)
        if not train or not val:
            raise ValueError(f"{self.dataset.name} has {train} training and {val} validation pictures")

    def truth(self, sample: Any) -> Tensor:
        """Map (K, H, W) of a sample."""
        raise NotImplementedError

    def load(self, samples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), features (B, C, h, w) and truth (B, K, H', W')."""
        height, width = self.config.size
        pairs = [fit(sample.image, self.truth(sample), size=(height, width)) for sample in samples]
        image, truth = (torch.stack(tensors).to(self.config.device) for tensors in zip(*pairs, strict=True))
        return image, recall(self.backbone, image), F.interpolate(truth, self.config.grid, mode="nearest")

    @property
    def native(self) -> bool:
        """Tell whether predictions are made on the backbone's grid."""
        return bool(getattr(self.upsampler, "native", False))

    @torch.no_grad()
    def dense(self, features: Tensor, image: Tensor) -> Tensor:
        """The map that a head learns on, without gradients to the upsampler's own parameters."""
        return features if self.native else self.upsampler(features, image, self.config.grid)

    def enlarge(self, prediction: Tensor) -> Tensor:
        """Bring the predictions of a head to the size of the truth."""
        if not self.native:
            return prediction
        return F.interpolate(prediction, self.config.grid, mode="bilinear", align_corners=False)

    def predict(self, head: Callable[[Tensor], Tensor], features: Tensor, image: Tensor) -> Tensor:
        """Predictions (B, K, H', W') of a pointwise head, through the upsampler's stream where it has one."""
        if self.native:
            return self.enlarge(head(features))
        return with_head(self.upsampler, features, image, self.config.grid, head)

    def thumbnail(self, image: Tensor) -> "Image.Image":
        """The image (1, 3, H, W) at the size of the truth."""
        small = F.interpolate(image, self.config.grid, mode="bilinear", align_corners=False, antialias=True)
        return picture(small[0])
