"""LIIF: a local implicit function of features and relative coordinates."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...networks.layers import Box
from .base import LearnedConfig, LearnedUpsampler

__all__ = ["LIIF"]


class LIIF(LearnedUpsampler):
    """An MLP of the nearest cells' features, the pixel's place relative to them and its size, at any size.

    Chen et al., *Learning Continuous Image Representation with Local Implicit Image Function*, CVPR 2021. As
    published: 3x3 neighbourhoods of features are unfolded, 4 cells around the pixel answer and are weighted by the area
    of the opposite rectangle (local ensemble), and the pixel's size is an input (cell decoding). The image is not
    looked at. Other than published: hidden layers as wide as the features (1.9M parameters at C = 384, as the paper's
    table 7 says), the result is added to the bilinear interpolation, and the first layer, which is linear in the
    features, is evaluated once a cell instead of four times a pixel.
    """

    architecture: ClassVar[str] = "liif"

    def __init__(self, config: LearnedConfig | int) -> None:
        super().__init__(config)
        channels = self.config.channels
        self.unfold = nn.Conv2d(channels, channels, 3, padding=1)
        self.place = nn.Linear(4, channels, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def compute(self, normalised: Tensor, guidance: Tensor, box: Box) -> Tensor:
        """See :class:`LearnedUpsampler`."""
        (h, w), (height, width) = normalised.shape[-2:], guidance.shape[-2:]
        device = normalised.device
        rows = (torch.arange(box[0], box[2], device=device) + 0.5) * h / height - 0.5
        columns = (torch.arange(box[1], box[3], device=device) + 0.5) * w / width - 0.5
        first = self.unfold(normalised)
        size = torch.tensor([2 * h / height, 2 * w / width], device=device).expand(len(rows), len(columns), 2)
        result = torch.zeros((), device=device, dtype=normalised.dtype)
        for down in (0, 1):
            for right in (0, 1):
                i, j = rows.floor() + down, columns.floor() + right
                offset = torch.stack(torch.meshgrid(rows - i, columns - j, indexing="ij"), -1)
                weight = (1 - (rows - i).abs())[:, None] * (1 - (columns - j).abs())
                inside_i, inside_j = i.long().clamp(0, h - 1), j.long().clamp(0, w - 1)
                cells = (slice(None), slice(None), inside_i[:, None], inside_j[None])
                x = first[cells].movedim(1, -1) + self.place(torch.cat([2 * offset, size], -1).to(self.dtype))
                for layer in self.hidden:
                    x = layer(F.relu(x))
                x = self.out(F.relu(x)).movedim(-1, 1)
                result = result + weight.to(x.dtype) * (x + normalised[cells])
        return result
