"""Interpolate and convolve, four times over."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Doubling, DoublingUpsampler, LearnedConfig

__all__ = ["ResizeConv"]


class _Level(Doubling):
    margin: ClassVar[int] = 2  # 1 cell of the interpolation, 1 pixel of the convolution

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(channels + 3, channels, 3, padding=1)
        nn.init.zeros_(self.convolve.weight)
        nn.init.zeros_(self.convolve.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x + self.convolve(F.gelu(torch.cat([x, guidance.to(x.dtype)], 1)))  # type: ignore[no-any-return]


class ResizeConv(DoublingUpsampler):
    """Four times: double bilinearly, append the image, activate, convolve 3x3, add; then interpolate to the size.

    The paper's baseline of this name (tables 5 and 7), of which it tells the number of parameters, 5.4M at C = 384, as
    here. The residuals are ours: the network begins as bilinear interpolation.
    """

    architecture: ClassVar[str] = "resize_conv"

    def __init__(self, config: LearnedConfig | int) -> None:
        super().__init__(config)
        self.levels = nn.ModuleList(_Level(self.config.channels) for _ in range(4))

    def steps(self, factor: float) -> list[Doubling]:
        """All 4 levels, whatever the factor."""
        return list(self.levels)  # type: ignore[arg-type]
