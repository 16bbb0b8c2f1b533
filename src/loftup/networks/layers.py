"""Building blocks of the LoftUp network (paper section 3.1 and figure 3).

Shapes: ``image (B, 3, H, W)``, ``features (B, C, h, w)``, tokens ``(B, n, D)``. Module and parameter names follow
the published checkpoints, so that their state dicts load as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.attention import cross_attention
from ..ops.reference import Box

__all__ = [
    "Box",
    "ChannelNorm",
    "CrossAttention",
    "CrossTransformer",
    "FeedForward",
    "FourierCode",
    "ImageCode",
    "LayerNorm2d",
    "MinMaxScale",
    "Stem",
    "axis_coordinates",
    "grid_coordinates",
    "grow",
    "reach",
    "run",
    "trim",
]

Margins = tuple[int, int, int, int]  # pixels beyond a box at its top, left, bottom and right

LOWEST_LOG_FREQUENCY, HIGHEST_LOG_FREQUENCY = -2.0, 10.0


def axis_coordinates(length: int, device: torch.device | None = None) -> Tensor:
    """Coordinates of ``length`` rows or columns, (length,), float32 from -1 to 1 with both ends included."""
    if not torch.compiler.is_compiling():
        return torch.linspace(-1.0, 1.0, length, device=device, dtype=torch.float32)
    # linspace would fix the length of a graph. This is its arithmetic, equal but for the last bit.
    index, last = torch.arange(length, device=device, dtype=torch.float32), torch.sym_max(length - 1, 1)
    return torch.where(2 * index < last, index * (2 / last) - 1, 1 - (last - index) * (2 / last))


def grid_coordinates(height: int, width: int, device: torch.device | None = None, box: Box | None = None) -> Tensor:
    """Row and column of every position of a grid, or of a box of it, (1, 2, height, width), float32 in [-1, 1]."""
    top, left, bottom, right = box or (0, 0, height, width)
    # Slices of the whole axes: an axis of the box's own would differ in the last bit, which e^10 makes visible.
    rows, columns = axis_coordinates(height, device)[top:bottom], axis_coordinates(width, device)[left:right]
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).unsqueeze(0)


class MinMaxScale(nn.Module):
    """Scale every channel of every image to [-0.5, 0.5] by its own minimum and maximum.

    The published code takes the extremes over the whole batch; here an image never depends on its batch-mates, and
    at batch 1 the two agree. A channel whose range is below 1e-4 is divided by 1e-4.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) of any affine range to float32 in [-0.5, 0.5]."""
        image = image.float()
        low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
        return (image - low) / (high - low).clamp(min=1e-4) - 0.5


class FourierCode(nn.Module):
    """Sines and cosines of a few values per position, at exponentially spaced frequencies with learned phases.

    ``values`` values become ``2 * frequencies * values`` channels: first all sines, then all cosines, frequency outer
    and value inner. Frequencies run from e^-2 to e^10 = 22 026, where a half-precision angle would be noise, so the
    angles are float32 whatever the module's dtype and autocast say.
    """

    frequencies: Tensor

    def __init__(self, values: int, frequencies: int) -> None:
        super().__init__()
        self.count = frequencies
        self.biases = nn.Parameter(torch.randn(2, values, frequencies))
        self.register_buffer("frequencies", self._spectrum(), persistent=False)

    def _spectrum(self) -> Tensor:
        # On the CPU always: another device's exp differs in the last bit, which e^10 makes visible.
        return torch.linspace(
            LOWEST_LOG_FREQUENCY, HIGHEST_LOG_FREQUENCY, self.count, device="cpu", dtype=torch.float32
        ).exp()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # .half() and .bfloat16() must not reach the frequencies.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frequencies = self._spectrum().to(self.biases.device)
        return self

    def forward(self, values: Tensor) -> Tensor:
        """Map (B, values, H, W) float32 to (B, 2 * frequencies * values, H, W) float32."""
        phases = self.biases.float()
        angles = rearrange(self.frequencies[:, None, None, None] * values.unsqueeze(1), "b f v h w -> b (f v) h w")
        # The published layout reads the (values, frequencies) phases by reshape, not by transposition.
        return torch.cat(
            [(angles + phases[0].reshape(1, -1, 1, 1)).sin(), (angles + phases[1].reshape(1, -1, 1, 1)).cos()], dim=1
        )


class ImageCode(FourierCode):
    """Guidance of section 3.1: Fourier code of (row, column, r, g, b) at every pixel, with the colours appended."""

    def __init__(self, frequencies: int) -> None:
        super().__init__(5, frequencies)

    def forward(self, image: Tensor, box: Box | None = None) -> Tensor:
        """Map a scaled image (B, 3, H, W), or a box of it, to (B, 10 * frequencies + 3, n, m) float32."""
        batch, _, height, width = image.shape
        coordinates = grid_coordinates(height, width, image.device, box).expand(batch, -1, -1, -1)
        if box is not None:
            image = image[..., box[0] : box[2], box[1] : box[3]]
        return torch.cat([super().forward(torch.cat([coordinates, image], dim=1)), image], dim=1)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply ``norm`` over the last dimension in float32, or float64 where either side is float64."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, norm.weight.dtype), torch.float32)
    return F.layer_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels at every position of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C; a float32 code stays float32 when the module is half precision."""
        return layer_norm(x.movedim(1, -1), self.norm).movedim(-1, 1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over C of (B, C, H, W), eps 1e-6: the norm of the head."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


# Layers that compute every pixel from itself alone (batch norms in evaluation mode).
POINTWISE = (
    *(nn.BatchNorm2d, nn.SyncBatchNorm, nn.Dropout, nn.ELU, nn.GELU, nn.Identity, nn.LayerNorm, nn.LeakyReLU),
    *(nn.Linear, nn.ReLU, nn.SiLU, ChannelNorm, LayerNorm2d),
)


def reach(module: nn.Module) -> int | None:
    """Pixels that a module's output sees to each side at most; None where that cannot be told.

    Known are convolutions (and their subclasses, with what they hold), layers of :data:`POINTWISE`, and rows of these.
    """
    total = 0
    if isinstance(module, nn.Conv2d):
        if module.padding_mode == "circular":
            return None
        total = max(d * (side - 1) + 1 for d, side in zip(module.dilation, module.kernel_size, strict=True)) // 2
    elif type(module) in POINTWISE:
        return 0
    elif not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    for part in map(reach, module.children()):
        if part is None:
            return None
        total += part
    return total


class Stem(nn.Sequential):
    """From the guidance code to the queries: norm, then two 3x3 convolutions with batch norm and ReLU.

    Zero padding is at the image's true border only, also where a box of the image is computed.
    """

    def __init__(self, code_channels: int, width: int) -> None:
        super().__init__(
            ChannelNorm(code_channels),
            nn.Conv2d(code_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    # The published checkpoints number the layers; these are their names.
    norm = property(lambda self: self[0])
    conv1 = property(lambda self: self[1])
    batch_norm1 = property(lambda self: self[2])
    conv2 = property(lambda self: self[4])
    batch_norm2 = property(lambda self: self[5])

    @property
    def halo(self) -> int | None:
        """Pixels around a box that its result depends on; None where a replaced layer may see the whole image."""
        return reach(self)

    def forward(  # type: ignore[override]
        self, code: Tensor, dtype: torch.dtype, margins: Margins = (0, 0, 0, 0)
    ) -> Tensor:
        """Compute the queries of a box.

        Args:
            code: (B, E, n + margins, m + margins) float32, of the box and its margins.
            dtype: of the convolutions.
            margins: at each side :attr:`halo` pixels, or as many as there are before the image's border.

        Returns:
            (B, D, n, m).
        """
        x, layers = code, list(self)
        for index, layer in enumerate(layers):
            x = layer(x) if index else layer(x).to(dtype)
            # Convolutions pad with zeros; at a side that is not the image's border, what they touched is cut off.
            if any(margins):
                x, margins = trim(x, margins, sum(reach(later) or 0 for later in layers[index + 1 :]))
        return x


def grow(box: Box, halo: int, height: int, width: int) -> tuple[Box, Margins]:
    """A box and ``halo`` pixels around it as far as the image reaches, and how many these are at each side."""
    top, left, bottom, right = box
    grown = max(0, top - halo), max(0, left - halo), min(height, bottom + halo), min(width, right + halo)
    return grown, (top - grown[0], left - grown[1], grown[2] - bottom, grown[3] - right)


def trim(x: Tensor, margins: Margins, most: int) -> tuple[Tensor, Margins]:
    """Leave margins of at most ``most`` pixels around (B, D, n, m)."""
    left_over = tuple(min(margin, most) for margin in margins)
    top, left, bottom, right = (margin - rest for margin, rest in zip(margins, left_over, strict=True))
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right], left_over  # type: ignore[return-value]


def run(checkpointing: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function, with activation checkpointing if asked for."""
    if checkpointing:
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


class Attention(nn.Module):
    """Multi-head attention of tokens to tokens, with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """Heads, for ``print(up)``."""
        return f"heads={self.heads}"

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Let ``queries`` (B, n, D) attend to ``tokens`` (B, t, D); returns (B, n, D)."""
        q, k, v = self._project(queries, tokens)
        return self.out_proj(rearrange(cross_attention(q, k, v, q.shape[-1] ** -0.5), "b heads n d -> b n (heads d)"))  # type: ignore[no-any-return]

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Shares that the queries take of each token: (B, heads, n, t), with sum 1 over t."""
        q, k, _ = self._project(queries, tokens)
        weights: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return weights

    def _project(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, n or t, d)."""
        width = queries.shape[-1]
        q = F.linear(queries, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(tokens, self.in_proj_weight[width:], self.in_proj_bias[width:])
        q = rearrange(q, "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(kv, "b t (two heads d) -> two b heads t d", two=2, heads=self.heads)
        return q, k, v


class CrossAttention(nn.Module):
    """Pre-normed attention of pixels to feature tokens, without the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, n, D) and (B, t, D) to (B, n, D)."""
        return self.attention(self.norm_q(queries), self.norm_kv(tokens))  # type: ignore[no-any-return]

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """As :meth:`Attention.weights`."""
        return self.attention.weights(self.norm_q(queries), self.norm_kv(tokens))


class FeedForward(nn.Module):
    """LayerNorm, Linear D->C, exact GELU, Linear C->D, without the residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # Index 3 is dropout in the published layout; nothing is dropped.
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        return self.net(x)  # type: ignore[no-any-return]


class CrossTransformer(nn.Module):
    """Blocks of cross-attention and feed-forward with residuals, and a final LayerNorm."""

    def __init__(self, width: int, hidden: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(width, heads), FeedForward(width, hidden)]) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, tokens: Tensor, checkpointing: bool = False) -> Tensor:
        """Refine ``queries`` (B, n, D) by ``tokens`` (B, t, D)."""
        for block in self.layers:
            attention, feed_forward = block[0], block[1]  # type: ignore[index]
            queries = queries + run(checkpointing, attention, queries, tokens)
            queries = queries + run(checkpointing, feed_forward, queries)
        return self.norm(queries)  # type: ignore[no-any-return]
