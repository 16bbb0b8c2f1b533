"""Engines: how the published network is computed in inference. This one is plain: folded weights, PyTorch's operations.

An engine turns guidance into queries (``stem``) and queries into features (``write``, ``at``);
:mod:`loftup.inference.bands` decides which pixels when.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..networks.layers import Box, axis_coordinates, grow, trim
from ..ops.attention import cross_attention
from ..ops.reference import Pair, fourier_code
from .canvas import plain_arithmetic
from .fold import FoldedNetwork

__all__ = ["FoldedEngine", "KeyValue", "StemReader", "normalise"]

KeyValue = tuple[Tensor, Tensor]  # (heads, T, d) each


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without its affine part, which the next linear layer has taken over."""
    return F.layer_norm(x, x.shape[-1:])


class FoldedEngine:
    """Stem and blocks in one floating dtype, on every device; the guidance code and its norm in float32 or wider.

    Args:
        weights: folded weights.
        dtype: to compute in.
        stem_dtype: for the convolutions, where it differs.
    """

    in_threads = True  # whether several threads may use it at once

    def __init__(self, weights: FoldedNetwork, dtype: torch.dtype, stem_dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.stem_dtype = stem_dtype or dtype
        self.heads, self.halo = weights.heads, weights.halo
        self.width, self.channels = len(weights.conv2[1]), len(weights.head_norm[1])
        self.guidance = weights.code
        place = functools.partial(_to, device=weights.code[0].device)
        self.arithmetic = functools.partial(plain_arithmetic, weights.code[0].device)
        self.code_norm = place(weights.code_norm, torch.promote_types(dtype, torch.float32))
        self.conv1, self.conv2 = place(weights.conv1, self.stem_dtype), place(weights.conv2, self.stem_dtype)
        self.blocks = [
            {name: place(getattr(block, name), dtype) for name in ("query", "key_value", "out", "up", "down")}
            for block in weights.blocks
        ]
        self.head = place(weights.head, dtype) if weights.head else None
        self.final_norm = place(weights.final_norm, dtype) if weights.final_norm else None
        self.head_norm = place(weights.head_norm, dtype)

    def rows(self, width: int, budget: int) -> int:
        """How many rows of a strip ``width`` pixels wide fit a budget of working memory in bytes; 0 if none does."""
        code = self.code_norm[0].numel()
        stem = code * (4 * self.code_norm[0].itemsize + self.dtype.itemsize)
        blocks = self.dtype.itemsize * (6 * self.width + 2 * self.channels)
        return max(0, budget // (width * (stem + blocks)) - 2 * self.halo)

    def keys_values(self, tokens: Tensor) -> list[KeyValue]:
        """Project the tokens (1, T, D) once for every block: keys and values, (heads, T, d) each."""
        normal = normalise(tokens[0].to(self.dtype))
        return [self._split(F.linear(normal, *block["key_value"])) for block in self.blocks]

    def _split(self, projected: Tensor) -> KeyValue:
        keys, values = rearrange(projected, "t (two heads d) -> two heads t d", two=2, heads=self.heads)
        return keys.contiguous(), values.contiguous()

    def stem(self, scaled: Tensor, left: int, right: int, band: int) -> "StemReader":
        """Start reading the stem's output for a strip of columns from the top.

        Args:
            scaled: (3, H, W) float32, the image scaled to [-0.5, 0.5].
            left: first column of the strip.
            right: last column, excluded.
            band: at most so many rows will be read at once.
        """
        return StemReader(self.queries, scaled, left, right)

    def queries(self, scaled: Tensor, box: Box) -> Tensor:
        """The stem's output for a box of (3, H, W): (n * m, D)."""
        around, margins = grow(box, self.halo, *scaled.shape[1:])
        # A convolution pads with zeros; at a side that is not the image's border, what they touched is cut off.
        x, margins = trim(self.first_layer(scaled, around), margins, 1)
        x, _ = trim(F.conv2d(x, *self.conv2, padding=1).relu_(), margins, 0)
        return rearrange(x, "1 d h w -> (h w) d").to(self.dtype)

    def at(self, scaled: Tensor, memory: list[KeyValue], pixels: Tensor) -> Tensor:
        """Features (n, C) at pixels, flat indices row * W + column (n,), from what the stem sees around each."""
        height, width = scaled.shape[1:]
        rows, columns = axis_coordinates(height, scaled.device), axis_coordinates(width, scaled.device)
        around = torch.arange(-self.halo, self.halo + 1, device=pixels.device)
        y, x = (pixels // width)[:, None] + around, (pixels % width)[:, None] + around
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        y, x = (t.expand(inside.shape) for t in (y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]))
        values = torch.cat([torch.stack([rows[y], columns[x]], -1), scaled[:, y, x].movedim(0, -1)], -1)
        code = (self.code(values) * inside[..., None]).movedim(-1, 1)
        hidden = F.conv2d(code, *self.conv1).relu_() * inside[:, None, 1:-1, 1:-1]
        return self.pixels(F.conv2d(hidden, *self.conv2).relu_().flatten(1).to(self.dtype), memory)

    def first_layer(self, scaled: Tensor, box: Box) -> Tensor:
        """Code and first convolution of a box of (3, H, W), zeros around it: (1, D, n, m)."""
        top, left, bottom, right = box
        height, width = scaled.shape[1:]
        rows, columns = axis_coordinates(height, scaled.device), axis_coordinates(width, scaled.device)
        coordinates = torch.stack(torch.meshgrid(rows[top:bottom], columns[left:right], indexing="ij"), dim=-1)
        code = self.code(torch.cat([coordinates, scaled[:, top:bottom, left:right].movedim(0, -1)], dim=-1))
        return F.conv2d(code.movedim(-1, 0)[None], *self.conv1, padding=1).relu_()

    def code(self, values: Tensor) -> Tensor:
        """Normalised guidance code of values (..., 5), in the stem's dtype."""
        code = fourier_code(values, self.guidance).to(self.code_norm[0].dtype)
        return F.layer_norm(code, code.shape[-1:], *self.code_norm).to(self.stem_dtype)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of (M, heads * d) to (heads, T, d) with the scale in the queries already; (M, heads * d)."""
        split = rearrange(queries, "m (heads d) -> 1 heads m d", heads=self.heads)
        return rearrange(cross_attention(split, keys[None], values[None], 1.0), "1 heads m d -> m (heads d)")

    def write(self, queries: Tensor, memory: list[KeyValue], out: Tensor) -> None:
        """Blocks and head: stem output (n * m, D) to a box (C, n, m) of the result, of any strides and dtype."""
        out.copy_(self.pixels(queries, memory).view(*out.shape[1:], -1).movedim(-1, 0))

    def pixels(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """Blocks and head: stem output (M, D) to features (M, C)."""
        x = self.project(self.refine(x, memory))
        return F.layer_norm(x, x.shape[-1:], *self.head_norm, eps=1e-6)

    def refine(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """The blocks: (M, D) to (M, D)."""
        for block, (keys, values) in zip(self.blocks, memory, strict=True):
            attended = self.attend(F.linear(normalise(x), *block["query"]), keys, values)
            x = F.linear(attended, *block["out"]).add_(x)
            hidden = F.gelu(F.linear(normalise(x), *block["up"]))
            x = F.linear(hidden, *block["down"]).add_(x)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Final norm and 1x1 convolution: (M, D) to (M, C)."""
        if self.head is not None:
            return F.linear(normalise(x), *self.head)
        assert self.final_norm is not None
        return F.layer_norm(x, x.shape[-1:], *self.final_norm)


class StemReader:
    """Rows of the stem's output, from the top; each band computes its halo anew."""

    def __init__(self, queries: Callable[[Tensor, Box], Tensor], scaled: Tensor, left: int, right: int) -> None:
        self.queries, self.scaled, self.left, self.right = queries, scaled, left, right
        self.next_row = 0

    def read(self, count: int) -> Tensor:
        """The next ``count`` rows, (count * columns, D)."""
        top = self.next_row
        self.next_row += count
        return self.queries(self.scaled, (top, self.left, self.next_row, self.right))


def _to(pair: Pair, dtype: torch.dtype, device: torch.device) -> Pair:
    weight, bias = (x.to(dtype).to(device) for x in pair)  # in this order: not every device has float64
    # Channels last is the faster layout for convolutions on CPU and CUDA alike.
    return (weight.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight), bias
