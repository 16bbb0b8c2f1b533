"""The part of the universal network that looks at images: from pixels to guidance codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import reach

__all__ = ["GuidanceEncoder", "finer_image", "silence"]


def finer_image(guidance: Tensor) -> tuple[Tensor, int]:
    """Undo ``F.pixel_unshuffle``: (B, 3 k^2, H, W) to (B, 3, k H, k W), and k."""
    factor = 1
    while 3 * factor**2 < guidance.shape[1]:  # torch.compile does not see through math.isqrt
        factor += 1
    return (F.pixel_shuffle(guidance, factor) if factor > 1 else guidance), factor


class QuarterBlock(nn.Sequential):
    """A 3x3 and a 1x1 convolution that begin as nothing; their sum with the input is the block's output."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        silence(self[2])


class GuidanceEncoder(nn.Module):
    """A small convolutional network from scaled images to codes; most of it at half resolution, or at a quarter.

    Args:
        width: channels inside.
        code: channels of the codes.
        quarter: channels of the part at a quarter of the resolution; 0 for none. It begins as nothing.
    """

    dilations = (1, 2, 4)
    quarter_dilations = (1, 2, 4, 1, 2)

    def __init__(self, width: int, code: int, quarter: int = 0) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, code, 1)
        self.fine = nn.Conv2d(3, width // 2, 3, padding=1)
        self.fine_out = nn.Conv2d(width // 2, code, 1)
        self.down = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in self.dilations)
        self.coarse_out = nn.Conv2d(width, code, 1)
        self.has_quarter = quarter > 0
        if self.has_quarter:
            self.quarter_down = nn.Conv2d(width, quarter, 3, stride=2, padding=1)
            self.quarter_blocks = nn.ModuleList(QuarterBlock(quarter, d) for d in self.quarter_dilations)
            self.quarter_out = nn.Conv2d(quarter, code, 1)
            silence(self.quarter_out)

    @property
    def halo(self) -> int | None:
        """Pixels that a code at half resolution sees around it, at most; None where a replaced layer may see more.

        A multiple of 4, so that tiles with this halo begin where a pixel of every resolution does.
        """
        blocks = [reach(block) for block in self.blocks]
        pointwise = [self.colour, self.fine_out, self.coarse_out]
        strided = [self.fine, self.down]
        quarter: list[int | None] = []
        if self.has_quarter:
            quarter = [reach(block) for block in self.quarter_blocks]
            pointwise.append(self.quarter_out)
            strided.append(self.quarter_down)
        if None in (*blocks, *quarter) or any(map(reach, pointwise)) or any(reach(layer) != 1 for layer in strided):
            return None
        halo = 2 * (1 + sum(filter(None, blocks))) + 2
        if self.has_quarter:
            halo += 4 * (2 + sum(filter(None, quarter)))  # of which one for the doubling
        return -(-halo // 4) * 4

    def coarse(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-0.5, 0.5] to codes (B, D, ceil(H / 2), ceil(W / 2))."""
        x = F.relu(self.down(F.relu(self.fine(image))))
        for block in self.blocks:
            x = x + F.relu(block(x))
        codes: Tensor = self.coarse_out(x)
        if not self.has_quarter:
            return codes
        x = F.relu(self.quarter_down(x))
        for block in self.quarter_blocks:
            x = x + block(x)
        return codes + _doubled(self.quarter_out(x), codes)

    def fine_codes(self, image: Tensor) -> Tensor:
        """The part of the codes at full resolution: (B, 3, H, W) to (B, D, H, W)."""
        return self.colour(image) + self.fine_out(F.relu(self.fine(image)))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to codes (B, D, H, W)."""
        return self.fine_codes(image) + _doubled(self.coarse(image), image)


def _doubled(x: Tensor, target: Tensor) -> Tensor:
    """A map at twice its resolution, cut to the size of the target."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    height, width = target.shape[-2:]
    if torch.compiler.is_compiling():  # a slice would tie a graph to sizes of which it cuts as much
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[..., :height, :width]


def silence(layer: nn.Module) -> None:
    """Set a layer's parameters to 0, so that it begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
