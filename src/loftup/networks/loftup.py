"""The published network: pixels ask, low-resolution features answer (paper section 3.1, figure 3)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import LoftUpConfig
from .layers import (
    Box,
    CrossTransformer,
    FourierCode,
    ImageCode,
    LayerNorm2d,
    MinMaxScale,
    Stem,
    grid_coordinates,
    grow,
    run,
)

__all__ = ["LoftUpNetwork"]


class LoftUpNetwork(nn.Module):
    """The network behind the channel norm; its parameter names are those of the published ``upsampler.*``."""

    def __init__(self, config: LoftUpConfig) -> None:
        super().__init__()
        self.config = config
        channels, width = config.channels, config.width
        self.lr_pe: FourierCode | Tensor
        if config.position_code == "sine":
            self.lr_pe = FourierCode(2, config.feature_frequencies)
        else:
            self.lr_pe = nn.Parameter(0.02 * torch.randn(1, config.lr_size**2, channels))
        self.fourier_feat = nn.Sequential(MinMaxScale(), ImageCode(config.image_frequencies))
        self.first_conv = Stem(10 * config.image_frequencies + 3, width)
        self.ca_transformer = CrossTransformer(width, channels, config.heads, config.blocks)
        self.final_conv = (
            nn.Sequential(nn.Conv2d(width, channels, 1), LayerNorm2d(channels))
            if config.position_code == "sine"
            else LayerNorm2d(channels)
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes, all but the guidance code: that of its parameters."""
        return next(self.parameters()).dtype

    def forward(
        self, features: Tensor, guidance: Tensor, box: Box | None = None, *, checkpointing: bool = False
    ) -> Tensor:
        """Compute the upsampled features, or a box of them at the cost of the box.

        Exact for a box where the batch norms use their running statistics: in training mode their statistics are those
        of the box, among them the mean of the position code, which no longer tells the position.

        Args:
            features: (B, C, h, w), behind the channel norm, in :attr:`dtype`.
            guidance: (B, 3, H, W), the image at output size.
            box: (top, left, bottom, right) of the output pixels wanted; None means all.
            checkpointing: compute the blocks' activations, and with frozen batch norms the stem's, again in the
                backward pass, to save memory.

        Returns:
            (B, C, bottom - top, right - left).
        """
        top, left, bottom, right = box or (0, 0, *guidance.shape[-2:])
        # A second pass through batch norms in training mode would update their statistics again.
        learning = any(layer.training for layer in self.first_conv if isinstance(layer, nn.BatchNorm2d))
        queries = run(checkpointing and not learning, self.queries, guidance, box)
        queries = self.ca_transformer(queries, self.tokens(features), checkpointing)
        return self.head(queries, bottom - top, right - left)

    def attention(self, features: Tensor, guidance: Tensor, row: int, column: int) -> Tensor:
        """How an output pixel attends to the cells in the last block, the mean of its heads: (B, h, w), with sum 1.

        Arguments are those of :meth:`forward`.
        """
        queries, tokens = self.queries(guidance, (row, column, row + 1, column + 1)), self.tokens(features)
        for block in list(self.ca_transformer.layers)[:-1]:
            queries = queries + block[0](queries, tokens)  # type: ignore[index]
            queries = queries + block[1](queries)  # type: ignore[index]
        weights: Tensor = self.ca_transformer.layers[-1][0].weights(queries, tokens)  # type: ignore[index]
        return weights.mean(1).view(len(features), *features.shape[2:])

    def queries(self, guidance: Tensor, box: Box | None = None) -> Tensor:
        """Guidance code and stem: an image (B, 3, H, W), or a box of it, to (B, n, D)."""
        return self.stem(self.fourier_feat[0](guidance), box)

    def stem(self, scaled: Tensor, box: Box | None = None) -> Tensor:
        """As :meth:`queries`, of an image that is scaled to [-0.5, 0.5] already."""
        margins = (0, 0, 0, 0)
        if box is not None:
            box, margins = grow(box, self.first_conv.halo or 0, *scaled.shape[-2:])
        code = self.fourier_feat[1](scaled, box)  # float32 whatever the network's dtype
        return rearrange(self.first_conv(code, self.dtype, margins), "b d h w -> b (h w) d")  # type: ignore[no-any-return]

    def tokens(self, features: Tensor) -> Tensor:
        """Keys and values: normalised features (B, C, h, w) with their positions, as (B, h*w, D)."""
        batch, _, h, w = features.shape
        if isinstance(self.lr_pe, FourierCode):
            position = self.lr_pe(grid_coordinates(h, w, features.device)).to(features.dtype)
            grid = torch.cat([features, position.expand(batch, -1, -1, -1)], dim=1)
        else:
            side = self.config.lr_size
            table = rearrange(self.lr_pe, "1 (i j) c -> 1 c i j", i=side)
            if (h, w) != (side, side):
                table = F.interpolate(table.float(), (h, w), mode="bicubic", align_corners=False)
            grid = features + table.to(features.dtype)
        return rearrange(grid, "b d h w -> b (h w) d")

    def head(self, queries: Tensor, height: int, width: int) -> Tensor:
        """Refined queries (B, n, D) of a box of that size to features (B, C, height, width)."""
        return self.final_conv(rearrange(queries, "b (h w) d -> b d h w", h=height, w=width))  # type: ignore[no-any-return]
