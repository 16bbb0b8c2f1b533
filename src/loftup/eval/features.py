"""Features of pictures, remembered where several upsamplers are given the same ones."""

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ..backbones import Backbone

__all__ = ["extract", "recall", "remembering"]

LIMIT = 512 * 2**20  # bytes of remembered features: two thousand pictures of 16 x 16 cells of 256 channels


def extract(backbone: Backbone, image: Tensor) -> Tensor:
    """Features (B, C, h, w) in float32 of images (B, 3, H, W) in [0, 1], without gradients."""
    with torch.no_grad():
        features: Tensor = backbone(backbone.normalise(image))
    return features.float()


class _Memory:
    """Features by the bytes of their picture, up to a number of bytes; what comes later is computed each time.

    Nothing is forgotten for others: pictures come in the same order for every upsampler, so that the oldest would
    always be gone before it is asked for again.
    """

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.features: dict[tuple[int, tuple[int, ...], bytes], Tensor] = {}

    def get(self, backbone: Backbone, image: Tensor) -> Tensor:
        content = image.detach().cpu().contiguous().numpy()
        key = id(backbone), tuple(image.shape), hashlib.blake2b(content.tobytes()).digest()
        features = self.features.get(key)
        if features is None:
            features = extract(backbone, image)
            size = features.numel() * features.element_size()
            if size > self.free:
                return features
            self.free -= size
            self.features[key] = features
        return features.clone()  # so that one who writes into them spoils nothing


_current: ContextVar[_Memory | None] = ContextVar("remembered features", default=None)


@contextlib.contextmanager
def remembering(limit: int = LIMIT) -> Iterator[None]:
    """Let :func:`recall` remember features, up to ``limit`` bytes, until the end of the ``with`` block."""
    token = _current.set(_Memory(limit))
    try:
        yield
    finally:
        _current.reset(token)


def recall(backbone: Backbone, image: Tensor) -> Tensor:
    """As :func:`extract`; within :func:`remembering`, features of a picture that came before are not made again.

    Only pictures that come alone (B = 1) are remembered: batches are drawn anew in every epoch.
    """
    memory = _current.get()
    return extract(backbone, image) if memory is None or len(image) != 1 else memory.get(backbone, image)
