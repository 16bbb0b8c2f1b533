"""Another project's upsampler as teacher: what it makes of the same features, as target at every pixel.

The student's attention averages projected features, and the teacher's output is projected alike. The teacher is frozen,
so that for fixed crops its outputs can be kept on disk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ..baselines.foreign import ForeignUpsampler, load_foreign
from ..config import TrainConfig
from ..data.cache import FeatureCache, digest_of
from ..data.generators import seeded
from ..data.views import Batch
from .maps import cut, pool_to, project
from .standardise import Standardisation

__all__ = ["Imitation"]


class Imitation:
    """The term's teachers, one for each backbone that it is for, and what they have said.

    Args:
        config: of the run, whose term has a weight.
        backbones: of the run.
        caches: of the backbones' features; empty for none.
        device: of the run.

    Raises:
        LoftUpError: the teacher cannot be loaded, or is for another number of channels.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbones: Sequence[Backbone],
        caches: Sequence[FeatureCache],
        device: torch.device,
    ) -> None:
        self.settings = config.objective.imitation
        assert self.settings.upsampler is not None
        self.teachers: dict[int, ForeignUpsampler] = {}
        self.caches: dict[int, FeatureCache] = {}
        self.projections: dict[int, Tensor] = {}
        for number in self.settings.backbones or range(len(backbones)):
            channels = backbones[number].channels
            teacher = load_foreign(self.settings.upsampler, channels).to(device)
            self.teachers[number] = teacher
            self.projections[number] = projection(channels, self.settings.channels).to(device)
            if caches:
                identity = digest_of(teacher, self.settings.ratio, self.settings.channels, teacher.code)
                self.caches[number] = FeatureCache(caches[number].folder / f"imitation-{identity}")

    def applies(self, batch: Batch) -> bool:
        """Tell whether the term counts for a batch."""
        return batch.backbone in self.teachers

    def values(self, features: Tensor, standardise: Standardisation, batch: Batch) -> Tensor:
        """Project the standardised features, for the student to average: (B, K, h, w)."""
        return project(standardise(features), self.projections[batch.backbone])

    def loss(self, output: Tensor, features: Tensor, standardise: Standardisation, batch: Batch) -> Tensor:
        """The distance in the batch's window.

        Args:
            output: (B, K, ...), the window of the student's average of :meth:`values`.
            features: (B, C, h, w), as the backbone gave them.
            standardise: of all their channels.
            batch: whose image the teacher sees.
        """
        target = self._target(features, standardise, batch).to(output.dtype)
        whole, theirs = batch.guidance.shape[-1], target.shape[-1]
        window = batch.window or (0, 0, whole, whole)
        if theirs >= whole:
            target = cut(pool_to(target, (whole, whole)), window)
        else:
            top, left, bottom, right = (edge * theirs // whole for edge in window)
            target = cut(target, (top, left, bottom, right))
            output = pool_to(output, (bottom - top, right - left))
        return F.mse_loss(output, target)

    @torch.no_grad()
    def _target(self, features: Tensor, standardise: Standardisation, batch: Batch) -> Tensor:
        """Get the teacher's output on the terms' scale, projected: (B, K, T, T), from the cache or anew."""
        directions, cache = self.projections[batch.backbone], self.caches.get(batch.backbone)
        if cache is None or not batch.keys:
            return project(standardise(self._teach(features, batch.image, batch.backbone)), directions)
        targets = []
        for index, key in enumerate(batch.keys):
            target = cache.read(key)
            if target is None:
                one = slice(index, index + 1)
                dense = self._teach(features[one], batch.image[one], batch.backbone)
                target = project(standardise.of(one)(dense), directions)[0].half()
                cache.write(key, target)
            targets.append(target.to(features))  # autocast on a CPU cannot stack float16
        return torch.stack(targets)

    def _teach(self, features: Tensor, image: Tensor, number: int) -> Tensor:
        side = round(image.shape[-1] * self.settings.ratio)
        with torch.autocast(features.device.type, enabled=False):
            return self.teachers[number](features, image, (side, side))  # type: ignore[no-any-return]


def projection(channels: int, most: int) -> Tensor:
    """Orthonormal directions (C, K) drawn at random, the same for every run; K is at most C."""
    drawn = torch.randn(channels, min(most, channels), generator=seeded(0, "projection", channels))
    directions: Tensor = torch.linalg.qr(drawn)[0]
    return directions
