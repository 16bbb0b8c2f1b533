"""Joint bilateral upsampling without learned parameters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError
from ...inputs import resize_guidance
from .registry import Upsampler, register

__all__ = ["JointBilateral"]


@dataclass
class JointBilateral:
    """Every pixel is a mean of the cells around, weighted by their distance and by how alike the colours are.

    Kopf et al., *Joint Bilateral Upsampling*, SIGGRAPH 2007: the weight of a cell is
    ``exp(-d^2 / 2 spatial^2) * exp(-|colour(pixel) - colour(cell)|^2 / 2 range^2)``, the colour of a cell being the
    mean of its pixels, divided by the sum of all weights. With a very large ``range`` it is Gaussian interpolation.

    Args:
        colour: the range kernel's standard deviation, for colours in [0, 1].
        spatial: the spatial kernel's standard deviation in cells.
        radius: how many cells around the pixel's own one count, in each direction.
    """

    colour: float = 0.1
    spatial: float = 0.75
    radius: int = 2

    def __call__(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and the image (B, 3, H, W) in [0, 1] to (B, C, H', W')."""
        h, w = features.shape[-2:]
        height, width = size
        guidance = resize_guidance(image, size).float()
        colours = F.adaptive_avg_pool2d(guidance, (h, w))
        rows, columns = _positions(height, h, features.device), _positions(width, w, features.device)
        nearest_row, nearest_column = rows.round().long(), columns.round().long()
        total = torch.zeros_like(guidance[:, :1])
        result = torch.zeros(*features.shape[:2], height, width, device=features.device)
        steps = range(-self.radius, self.radius + 1)
        for row in (nearest_row + step for step in steps):
            for column in (nearest_column + step for step in steps):
                inside = ((row >= 0) & (row < h))[:, None] & ((column >= 0) & (column < w))
                i, j = row.clamp(0, h - 1)[:, None], column.clamp(0, w - 1)[None]
                distance = (rows - row)[:, None] ** 2 + (columns - column)[None] ** 2
                difference = (guidance - colours[:, :, i, j]).square().sum(1, keepdim=True)
                exponent = distance / (2 * self.spatial**2) + difference / (2 * self.colour**2)
                # The floor keeps a colour like no other from losing all its weights.
                weight = torch.where(inside, (-exponent).clamp(min=-60).exp(), 0)
                total += weight
                result += weight * features[:, :, i, j]
        return (result / total).to(features.dtype)


def _positions(pixels: int, cells: int, device: torch.device) -> Tensor:
    """Pixel centres in cells: cell centres are whole numbers."""
    at = (torch.arange(pixels, device=device) + 0.5) * cells / pixels - 0.5
    return at.clamp(0, cells - 1)


@register("joint_bilateral")
def _joint_bilateral(backbone: Backbone, argument: str) -> Upsampler:
    try:
        colour = float(argument or 0.1)
    except ValueError:
        colour = 0
    if colour <= 0:
        expected = "the range kernel's deviation, a positive number for colours in [0, 1]"
        raise LoftUpError(
            f"the argument of 'joint_bilateral' is {expected}, got {argument!r}; write joint_bilateral:0.1"
        )
    return JointBilateral(colour)
