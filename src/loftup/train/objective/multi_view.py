"""FeatUp's consistency between views: dense features, moved as the image is and downsampled, equal the backbone's.

Fu et al., *FeatUp: A Model-Agnostic Framework for Features at Any Resolution*, ICLR 2024.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..data.generators import seeded

__all__ = ["AttentionDownsampler", "Motion", "draw_motions"]


@dataclass(frozen=True)
class Motion:
    """An affine view of an image: a part of it, enlarged to the image's size, mirrored or not."""

    zoom: float  # magnification, at least 1
    shift: tuple[float, float]  # of the part's centre off the image's, down and right, as shares of the sides
    mirrored: bool  # whether columns are reversed

    def __call__(self, x: Tensor) -> Tensor:
        """Move (B, C, H, W), image or dense features alike, by bilinear sampling."""
        scale = 1 / self.zoom
        down, right = (2 * share for share in self.shift)
        theta = x.new_tensor([[-scale if self.mirrored else scale, 0, right], [0, scale, down]])
        grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def draw_motions(seed: int, step: int, views: int, zoom: float, shift: float, flip: float) -> list[Motion]:
    """Draw the views of a step; they stay inside the image, where alone it is known what the backbone would see.

    ``zoom`` and ``shift`` are the greatest ones, the latter as a share of the side, ``flip`` the probability of
    mirroring.
    """
    generator = seeded(seed, "motions", step)
    motions = []
    for _ in range(views):
        nearer, down, right, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        magnification = 1 + (zoom - 1) * nearer
        most = min(shift, (1 - 1 / magnification) / 2)
        motions.append(Motion(magnification, (most * (2 * down - 1), most * (2 * right - 1)), mirror < flip))
    return motions


class AttentionDownsampler(nn.Module):
    """FeatUp's learned downsampler: every cell is a weighted mean of the dense features in it.

    The weights are ``softmax(w * saliency(features) + b)`` over the cell's pixels, with a 1x1 convolution as saliency
    and a weight w and an offset b for every place in a cell.

    Args:
        channels: C.
        cell: side of a cell in pixels.
    """

    def __init__(self, channels: int, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.saliency = nn.Conv2d(channels, 1, 1)
        self.weight = nn.Parameter(1 + 0.01 * torch.randn(cell, cell))
        self.offset = nn.Parameter(0.01 * torch.randn(cell, cell))

    def forward(self, dense: Tensor) -> Tensor:
        """Map (B, C, H, W), H and W multiples of the cell, to (B, C, H / cell, W / cell)."""
        x = rearrange(dense, "b c (h i) (w j) -> b c h w (i j)", i=self.cell, j=self.cell)
        saliency = rearrange(self.saliency(dense), "b 1 (h i) (w j) -> b 1 h w (i j)", i=self.cell, j=self.cell)
        weights: Tensor = (saliency.to(self.weight.dtype) * self.weight.flatten() + self.offset.flatten()).softmax(-1)
        return (x * weights).sum(-1)
