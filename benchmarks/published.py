"""LoftUp the way it is published, written plainly from the paper: the contender that loftup is measured against.

Untiled; ``nn.MultiheadAttention`` as it comes, with materialised attention whose weights are averaged over the heads;
batch norms as they are; float32 by default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loftup import LoftUp


class Fourier(nn.Module):
    """Sines and cosines of ``values`` values a position."""

    def __init__(self, values: int, frequencies: int) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.empty(2, values, frequencies))

    def forward(self, x: Tensor) -> Tensor:
        """(B, values, H, W) to (B, 2 * frequencies * values, H, W)."""
        _, values, count = self.biases.shape
        frequencies = torch.exp(torch.linspace(-2, 10, count, device=x.device)).view(1, -1, 1, 1, 1)
        angles = frequencies * x[:, None]
        sine, cosine = (self.biases[i].float().reshape(1, count, values, 1, 1) for i in (0, 1))
        return torch.cat([torch.sin(angles + sine).flatten(1, 2), torch.cos(angles + cosine).flatten(1, 2)], 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Cross-attention and feed-forward."""

    def __init__(self, width: int, channels: int, sdpa: bool) -> None:
        super().__init__()
        self.sdpa = sdpa
        self.norm_q, self.norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Dropout(0.0), nn.Linear(channels, width)
        )

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        """(B, n, D) and (B, t, D) to (B, n, D)."""
        kv = self.norm_kv(kv)
        q = q + self.attention(self.norm_q(q), kv, kv, need_weights=not self.sdpa)[0]
        return q + self.net(q)


class Published(nn.Module):
    """The sine variant with a LoftUp's weights.

    Args:
        up: where the weights come from.
        sdpa: let ``nn.MultiheadAttention`` use scaled_dot_product_attention, by not asking for its weights.
    """

    def __init__(self, up: LoftUp, sdpa: bool = False) -> None:
        super().__init__()
        channels, width = up.config.channels, up.config.width
        self.norm = ChannelNorm(channels)
        self.grid_code, self.image_code = Fourier(2, 5), Fourier(5, 20)
        self.stem = nn.Sequential(
            ChannelNorm(203),
            nn.Conv2d(203, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList(Block(width, channels, sdpa) for _ in range(2))
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Conv2d(width, channels, 1), ChannelNorm(channels, eps=1e-6))
        # The same tensors in the same order, but for the channel norm, which LoftUp holds last.
        theirs = [value for key, value in up.state_dict().items() if not key.startswith("channelnorm")]
        order = [self.grid_code, self.image_code, self.stem, self.blocks, self.last_norm, self.head]
        ours = [value for module in order for value in module.state_dict().values()]
        for mine, value in zip(ours, theirs, strict=True):
            assert mine.shape == value.shape
            mine.copy_(value)
        self.norm.load_state_dict({k.rpartition(".")[2]: v for k, v in up.channelnorm.state_dict().items()})
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """(B, C, h, w) and (B, 3, H, W) to (B, C, H, W)."""
        batch, _, height, width = image.shape
        dtype = self.last_norm.weight.dtype
        image = image.float()
        low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
        colours = (image - low) / (high - low).clamp_min(1e-4) - 0.5
        values = torch.cat([self.axes(height, width, image), colours], 1)
        q = self.stem(torch.cat([self.image_code(values), colours], 1).to(dtype)).flatten(2).transpose(1, 2)
        position = self.grid_code(self.axes(*features.shape[-2:], image)).to(dtype)
        kv = torch.cat([self.norm(features.to(dtype)), position], 1).flatten(2).transpose(1, 2)
        for block in self.blocks:
            q = block(q, kv)
        return self.head(self.last_norm(q).transpose(1, 2).reshape(batch, -1, height, width))

    @staticmethod
    def axes(height: int, width: int, like: Tensor) -> Tensor:
        """Row and column coordinates, (B, 2, height, width)."""
        rows, columns = (torch.linspace(-1, 1, n, device=like.device) for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return grid[None].expand(len(like), -1, -1, -1)


class Bilinear(nn.Module):
    """The floor: plain interpolation."""

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, H, W)."""
        return F.interpolate(features, image.shape[-2:], mode="bilinear", align_corners=False)
