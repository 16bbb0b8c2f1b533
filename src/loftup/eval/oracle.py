"""Features that know the truth of the rendered scenes: the best that a task can give."""

import math
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import LoftUpError
from .catalogue import TASKS
from .datasets.base import Dataset
from .datasets.synthetic import CLASSES, LATER, MOST_OBJECTS, origins
from .upsamplers.registry import Upsampler

__all__ = ["Oracle"]


class Oracle:
    """A backbone whose features are the mean truth of every cell, and the upsampler that knows every pixel's.

    The truth is one-hot classes (segmentation), one-hot objects (video, interactive), depth and 1, the normal, or the
    object with a code of the place where it was at first (correspondence). It
    recognises a picture by its bytes. What a task makes of the perfect upsampler is the best that it can give.

    Args:
        dataset: whose pictures it knows, from :func:`loftup.eval.datasets.synthetic.synthetic`.
        task: that the dataset was made for.
        patch_size: side of a cell in pixels.
    """

    def __init__(self, dataset: Dataset[Any], task: str, patch_size: int = 16) -> None:
        self.dataset = dataset
        self.task = task
        self._kind = TASKS[task].data
        geometry = 2 if task == "depth" else 3
        channels = {"labels": len(CLASSES), "geometry": geometry, "objects": 2, "sequences": MOST_OBJECTS + 1}
        channels["pairs"] = MOST_OBJECTS + 1 + 4
        self.backbone = Backbone(
            nn.Identity(),
            lambda image: F.avg_pool2d(self._dense(image), patch_size),
            channels=channels[self._kind],
            patch_size=patch_size,
            name="oracle",
            mean=(0, 0, 0),
            std=(1, 1, 1),
            check=False,  # on pictures that it does not know
        ).eval()
        self.upsampler: Upsampler = self._upsample

    def _upsample(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        dense = self._dense(image)
        return dense if dense.shape[-2:] == size else F.interpolate(dense, size, mode="nearest-exact")

    def _dense(self, image: Tensor) -> Tensor:
        """Truth (B, C, H, W) of pictures (B, 3, H, W) in [0, 1]."""
        truths = []
        for picture in image:
            truth = self._truths.get(_fingerprint((picture * 255).round().byte()))
            if truth is None:
                raise LoftUpError(
                    f"the oracle knows the pictures of its dataset in their own size alone, got another of size "
                    f"{tuple(picture.shape[1:])}; give the task the size of the pictures"
                )
            truths.append(truth())
        return torch.stack(truths)

    @cached_property
    def _truths(self) -> dict[int, Callable[[], Tensor]]:
        """The truth of every picture, computed when it is asked for, by the picture's fingerprint."""
        samples = (*self.dataset.train, *self.dataset.val)
        if self._kind == "sequences":
            frames = ((video, index) for video in samples for index in range(len(video)))
            return {_fingerprint(video.frame(index)): partial(self._objects, video, index) for video, index in frames}
        if self._kind == "pairs":
            times = ((sample, time) for sample in samples for time in (0, LATER))
            return {
                _fingerprint(sample.target if time else sample.source): partial(self._place, sample, time)
                for sample, time in times
            }
        return {_fingerprint(sample.image): partial(self._truth, sample) for sample in samples}

    def _objects(self, video: Any, index: int) -> Tensor:
        return self._one_hot(video.annotation(index))

    def _place(self, sample: Any, time: int) -> Tensor:
        """A code whose cosine falls with the distance of two places of one object, and is small for two objects."""
        size = sample.source.shape[-1]
        objects, places = origins(int(sample.name), size, time)
        angles = places.movedim(-1, 0) * (math.pi / (1.5 * size))
        one_hot = F.one_hot(objects, MOST_OBJECTS + 1).movedim(-1, 0)
        return torch.cat([2.0 * one_hot, angles.cos(), angles.sin()])

    def _truth(self, sample: Any) -> Tensor:
        if self._kind == "geometry":
            if self.task == "depth":
                return torch.stack([sample.depth, torch.ones_like(sample.depth)])
            return sample.normals  # type: ignore[no-any-return]
        return self._one_hot(sample.mask if self._kind == "objects" else sample.labels)

    def _one_hot(self, labels: Tensor) -> Tensor:
        return rearrange(F.one_hot(labels, self.backbone.channels), "h w c -> c h w").float()


@lru_cache(maxsize=1)
def _weights(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 2**40, (count,), generator=generator)


def _fingerprint(image: Tensor) -> int:
    """A number that tells uint8 pictures apart."""
    return int((image.flatten().long() * _weights(image.numel())).sum())
