"""The plain engine: PyTorch's own operations on folded weights, on every device and in every floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.eager import cross_attention
from .fold import Pair, Weights

__all__ = ["EagerEngine", "KeyValue", "guidance_code", "normalise"]

KeyValue = tuple[Tensor, Tensor]  # (heads, T, d) each


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without its affine part, which the next linear layer has taken over."""
    return F.layer_norm(x, x.shape[-1:])


def guidance_code(values: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    """Fourier code of (row, column, r, g, b) with the colours appended (paper section 3.1).

    Args:
        values: (..., 5) float32.
        frequencies: (F,) float32.
        phases: (2, 5, F) float32, for sine and cosine.

    Returns:
        (..., 10 F + 3) float32: sines, cosines (frequency outer, value inner), colours.
    """
    angles = frequencies[:, None] * values[..., None, :]  # (..., F, 5)
    sine, cosine = (angles + phases[0].mT).sin(), (angles + phases[1].mT).cos()
    return torch.cat([sine.flatten(-2), cosine.flatten(-2), values[..., 2:]], dim=-1)


class EagerEngine:
    """Stem and blocks in one floating dtype; the guidance code and its norm in float32 or wider.

    Args:
        weights: folded weights.
        dtype: to compute in.
        stem_dtype: for the convolutions, where it differs.
    """

    name = "torch"

    def __init__(self, weights: Weights, dtype: torch.dtype, stem_dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.stem_dtype = stem_dtype or dtype
        self.heads, self.width, self.channels = weights.heads, weights.width, weights.channels
        self.frequencies, self.phases = weights.frequencies, weights.phases
        self.code_norm = _to(weights.code_norm, torch.promote_types(dtype, torch.float32))
        self.conv1, self.conv2 = _to(weights.conv1, self.stem_dtype), _to(weights.conv2, self.stem_dtype)
        self.blocks = [
            {name: _to(getattr(block, name), dtype) for name in ("query", "key_value", "out", "up", "down")}
            for block in weights.blocks
        ]
        self.head = _to(weights.head, dtype) if weights.head else None
        self.final_norm = _to(weights.final_norm, dtype) if weights.final_norm else None
        self.head_norm = _to(weights.head_norm, dtype)

    def rows(self, width: int, budget: int) -> int:
        """How many rows of a strip ``width`` pixels wide fit a budget of working memory in bytes; 0 if none does."""
        code = self.code_norm[0].numel()
        stem = code * (4 * self.code_norm[0].itemsize + self.dtype.itemsize)
        blocks = self.dtype.itemsize * (6 * self.width + 2 * self.channels)
        return max(0, budget // (width * (stem + blocks)) - 4)  # less the halo's rows

    def keys_values(self, tokens: Tensor) -> list[KeyValue]:
        """Project the tokens (T, D) once for every block: keys and values, (heads, T, d) each."""
        normal = normalise(tokens)
        return [self._split(F.linear(normal, *block["key_value"])) for block in self.blocks]

    def _split(self, projected: Tensor) -> KeyValue:
        keys, values = projected.unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        return keys.contiguous(), values.contiguous()

    def stem(self, guidance: Tensor, rows: Tensor, columns: Tensor, band: int) -> "EagerStem":
        """Start reading the stem's output for an image from the top.

        Args:
            guidance: (3, H, W) float32, scaled to [-0.5, 0.5].
            rows: (H,) coordinates.
            columns: (W,) coordinates.
            band: at most so many rows will be read at once.
        """
        return EagerStem(self, guidance, rows, columns)

    def stem_at(self, guidance: Tensor, rows: Tensor, columns: Tensor, cells: Tensor) -> Tensor:
        """The stem's output at single pixels, from the 5x5 pixels around each.

        Args:
            guidance: (3, H, W) float32, scaled to [-0.5, 0.5].
            rows: (H,) coordinates.
            columns: (W,) coordinates.
            cells: (n,) flat indices row * W + column.

        Returns:
            (n, D).
        """
        height, width = len(rows), len(columns)
        around = torch.arange(-2, 3, device=cells.device)
        y, x = (cells // width)[:, None] + around, (cells % width)[:, None] + around
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        y, x = (t.expand(inside.shape) for t in (y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]))
        values = torch.cat([torch.stack([rows[y], columns[x]], -1), guidance[:, y, x].movedim(0, -1)], -1)
        code = (self.code(values) * inside[..., None]).movedim(-1, 1)
        hidden = F.conv2d(code, *self.conv1).relu_() * inside[:, None, 1:-1, 1:-1]
        return F.conv2d(hidden, *self.conv2).relu_().flatten(1).to(self.dtype)

    def first_layer(self, guidance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Code and first convolution of a band, zeros around it: (3, n, W) and its coordinates to (1, D, n, W)."""
        coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        code = self.code(torch.cat([coordinates, guidance.movedim(0, -1)], dim=-1)).movedim(-1, 0)[None]
        return F.conv2d(code, *self.conv1, padding=1).relu_()

    def code(self, values: Tensor) -> Tensor:
        """Normalised guidance code of values (..., 5), in the stem's dtype."""
        code = guidance_code(values, self.frequencies, self.phases).to(self.code_norm[0].dtype)
        return F.layer_norm(code, code.shape[-1:], *self.code_norm).to(self.stem_dtype)

    def linear(self, x: Tensor, weights: Pair) -> Tensor:
        """(M, K) to (M, N)."""
        return F.linear(x, *weights)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of (M, heads * d) to (heads, T, d) with the scale in the queries already; (M, heads * d)."""
        split = queries.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return cross_attention(split[None], keys[None], values[None], 1.0)[0].transpose(0, 1).flatten(1)

    def write(self, x: Tensor, memory: list[KeyValue], out: Tensor) -> None:
        """Blocks and head: stem output (n * m, D) to a band (C, n, m) of the result, of any strides and dtype."""
        out.copy_(self.pixels(x, memory).view(*out.shape[1:], -1).movedim(-1, 0))

    def pixels(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """Blocks and head: stem output (M, D) to features (M, C)."""
        x = self.project(self.refine(x, memory))
        return F.layer_norm(x, x.shape[-1:], *self.head_norm, eps=1e-6)

    def refine(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """The blocks: (M, D) to (M, D)."""
        for block, (keys, values) in zip(self.blocks, memory, strict=True):
            attended = self.attend(self.linear(normalise(x), block["query"]), keys, values)
            x = self.linear(attended, block["out"]).add_(x)
            hidden = F.gelu(self.linear(normalise(x), block["up"]))
            x = self.linear(hidden, block["down"]).add_(x)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Final norm and 1x1 convolution: (M, D) to (M, C)."""
        if self.head is not None:
            return self.linear(normalise(x), self.head)
        assert self.final_norm is not None
        return F.layer_norm(x, x.shape[-1:], *self.final_norm)


class EagerStem:
    """Rows of the stem's output, from the top; each band computes its 2-row halo anew."""

    def __init__(self, engine: EagerEngine, guidance: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.engine, self.guidance, self.rows, self.columns = engine, guidance, rows, columns
        self.next_row = 0

    def read(self, count: int) -> Tensor:
        """The next ``count`` rows, (count, W, D)."""
        engine, height, width = self.engine, len(self.rows), len(self.columns)
        start, end = self.next_row, self.next_row + count
        self.next_row = end
        low, high = max(0, start - 2), min(height, end + 2)
        x = engine.first_layer(self.guidance[:, low:high], self.rows[low:high], self.columns)
        # Zero padding belongs to the image's border alone: what it did at a band's edge is cut off.
        inner = max(0, start - 1), min(height, end + 1)
        x = F.conv2d(x[:, :, inner[0] - low : inner[1] - low], *engine.conv2, padding=1).relu_()
        x = x[0, :, start - inner[0] : end - inner[0]]
        return x.movedim(0, -1).reshape(count, width, engine.width).to(engine.dtype)


def _to(pair: Pair, dtype: torch.dtype) -> Pair:
    weight = pair[0].to(dtype)
    # Channels last is the faster layout for convolutions on CPU and CUDA alike.
    return (weight.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight), pair[1].to(dtype)
