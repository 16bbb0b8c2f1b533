"""Features of any backbone on one scale: the space in which the universal upsampler is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.generators import seeded

__all__ = ["Standardisation", "draw_channels", "draw_rotation", "standardisation"]

FLOOR = 0.1  # of a channel's deviation, as a share of the mean deviation of the picture's channels
FEWEST = 8  # channels that dropout leaves


@dataclass(frozen=True)
class Standardisation:
    """An affine map of every channel of every picture."""

    mean: Tensor  # (B, C, 1, 1)
    deviation: Tensor  # (B, C, 1, 1), above 0

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) of the same pictures, on any grid."""
        return ((features - self.mean) / self.deviation).to(features.dtype)

    def of(self, pictures: slice) -> "Standardisation":
        """The map of some of the pictures."""
        return Standardisation(self.mean[pictures], self.deviation[pictures])


@torch.no_grad()
def standardisation(features: Tensor) -> Standardisation:
    """The map that gives every channel of every picture mean 0 and standard deviation 1 over the cells.

    A channel that hardly varies in a picture keeps a small deviation: what is divided by is at least a tenth of the
    mean deviation of the picture's channels. A channel that is silent here and speaks up in the enlarged picture, as
    behind a ReLU, would otherwise outweigh all others.

    Args:
        features: (B, C, h, w), any float dtype; computed in float32 at least.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    deviation, mean = torch.std_mean(wide, (2, 3), correction=0, keepdim=True)
    floor = (FLOOR * deviation.mean(1, keepdim=True)).clamp(min=1e-6)
    return Standardisation(mean, deviation.maximum(floor))


def draw_channels(channels: int, share: float, seed: int, step: int) -> Tensor | None:
    """Draw the channels that a step keeps.

    Args:
        channels: C.
        share: greatest share that is left out; each up to it is as likely.
        seed: of the run.
        step: of the optimizer.

    Returns:
        (K,) int64, ascending, with K at least 8 or C; None for all.
    """
    if not share:
        return None
    generator = seeded(seed, "channels", step)
    left_out = share * float(torch.rand((), generator=generator, dtype=torch.float64))
    count = max(min(FEWEST, channels), round(channels * (1 - left_out)))
    return torch.randperm(channels, generator=generator)[:count].sort().values


def draw_rotation(channels: int, probability: float, seed: int, step: int) -> Tensor | None:
    """Draw the orthogonal map through which a step sees the channels.

    Args:
        channels: K, those that the step keeps.
        probability: that there is one.
        seed: of the run.
        step: of the optimizer.

    Returns:
        (K, K) float32, orthogonal; None for none.
    """
    generator = seeded(seed, "rotation", step)
    if not probability or float(torch.rand((), generator=generator)) >= probability:
        return None
    rotation: Tensor = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    return rotation
