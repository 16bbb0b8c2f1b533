"""LiFT: one small network that doubles the grid and can be applied to its own output."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Doubling, DoublingUpsampler, LearnedConfig

__all__ = ["LiFT"]


class _Double(Doubling):
    margin: ClassVar[int] = 5  # 2 cells of the encoder, 1 of the fusion, 1 of the decoder, 1 of the interpolation

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(32, channels * 7 // 16)
        self.encode = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1), nn.GELU()
        )
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU())
        self.fuse = nn.Sequential(nn.Conv2d(channels + 64, hidden, 3, padding=1), nn.GELU())
        self.up = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        self.decode = nn.Sequential(nn.Conv2d(hidden + 32, hidden, 3, padding=1), nn.GELU())
        self.out = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        fine = self.encode(guidance.to(x.dtype))
        fused = self.fuse(torch.cat([x, self.down(fine).to(x.dtype)], 1))
        decoded = self.decode(torch.cat([self.up(fused), fine], 1))
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) + self.out(decoded)  # type: ignore[no-any-return]


class LiFT(DoublingUpsampler):
    """A U-shape from features and image to features of twice the grid, applied until the output size is reached.

    Suri et al., *LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors*, ECCV 2024. As
    published: an image encoder whose maps are joined to the features at both resolutions, a transposed convolution
    between, about 1.2M parameters at C = 384, and the same weights for every doubling. Other than published: the image
    enters at the doubled grid's resolution, the result is added to the bilinear interpolation, with which the network
    therefore begins, and no batch norm. A size between two doublings is interpolated from the larger one.
    """

    architecture: ClassVar[str] = "lift"

    def __init__(self, config: LearnedConfig | int) -> None:
        super().__init__(config)
        self.step = _Double(self.config.channels)

    def steps(self, factor: float) -> list[Doubling]:
        """As many as reach the factor."""
        return [self.step] * max(1, math.ceil(math.log2(max(factor, 1))))
