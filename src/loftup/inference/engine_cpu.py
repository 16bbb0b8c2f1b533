"""The CPU engine: Winograd convolutions and cache-sized tiles of pixels, in float32 or bfloat16.

The stem runs in float32 for both dtypes: there Winograd in float32 beat a direct bfloat16 convolution on two AVX-512
cores with bfloat16 arithmetic. Where the processor has a matrix unit for bfloat16, the direct convolution is three
times as fast as Winograd, and the stem is the plain engine's. Attention is that of :mod:`loftup.ops.cpu`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..networks.layers import axis_coordinates
from ..ops.cpu import attend, has_bfloat16, has_matrix_unit
from ..ops.winograd import TILE, Winograd, Workspace
from .engine import FoldedEngine, KeyValue, StemReader
from .fold import FoldedNetwork

__all__ = ["CpuEngine"]

STEM_PIXELS = 3584  # Winograd's scratch for this many pixels stays in a shared cache of some tens of MB
BLOCK_PIXELS = 8192


class CpuEngine(FoldedEngine):
    """See :class:`FoldedEngine`.

    Args:
        weights: folded weights on the CPU.
        dtype: of the blocks and the head, float32 or bfloat16.
        matrix_unit: whether bfloat16 is computed for one; None means where the processor has one.
    """

    def __init__(self, weights: FoldedNetwork, dtype: torch.dtype, matrix_unit: bool | None = None) -> None:
        matrix_unit = dtype == torch.bfloat16 and (has_matrix_unit() if matrix_unit is None else matrix_unit)
        super().__init__(weights, dtype, stem_dtype=dtype if matrix_unit else torch.float32)
        self.matrix_unit = matrix_unit
        self.padding = -(self.width // self.heads) % 16 if matrix_unit else 0
        self.fused = matrix_unit or dtype == torch.float32 or not has_bfloat16()
        for block in self.blocks:
            block["query"] = self._pad_heads(block["query"][0]), self._pad_heads(block["query"][1])
            block["out"] = self._pad_heads(block["out"][0].mT).mT.contiguous(), block["out"][1]
        if matrix_unit:
            return  # without Winograd
        self.frequencies, phases = weights.code
        count = self.frequencies.numel()
        self.phases = phases.reshape(2, count, 5).transpose(1, 2).contiguous()  # (2, 5, F), by value
        order = _by_axis(count)
        self.stem_norm = self.code_norm[0][order], self.code_norm[1][order]
        self.layer1 = Winograd(weights.conv1[0][:, order], weights.conv1[1])
        self.layer2 = Winograd(*weights.conv2)

    def _pad_heads(self, x: Tensor) -> Tensor:
        """(heads * d, ...) with zeros behind every head, where attention runs faster on a rounder width."""
        padding = [0, 0] * (x.ndim - 1) + [0, self.padding]
        return F.pad(x.unflatten(0, (self.heads, -1)), padding).flatten(0, 1)

    def _split(self, projected: Tensor) -> KeyValue:
        keys, values = super()._split(projected)
        return F.pad(keys, (0, self.padding)), F.pad(values, (0, self.padding))

    def rows(self, width: int, budget: int) -> int:
        """See :meth:`FoldedEngine.rows`."""
        if self.matrix_unit:
            return super().rows(width, budget)
        wide = _padded(width)
        code = self.code_norm[0].numel()
        scratch = max(Winograd.bytes_per_pixel(code, self.width), Winograd.bytes_per_pixel(self.width, self.width))
        stem = scratch + 4 * (4 * code + 2 * self.width)
        block = self.dtype.itemsize * (6 * self.width + 2 * self.channels)
        most = max(TILE, BLOCK_PIXELS // wide // TILE * TILE)
        fitting = (
            rows
            for rows in range(most, 0, -TILE)
            if wide * (min(rows, _stem_rows(width)) * stem + rows * block) <= budget
        )
        return next(fitting, 0)

    def stem(self, scaled: Tensor, left: int, right: int, band: int) -> "StemReader | WinogradStem":  # type: ignore[override]
        """See :meth:`FoldedEngine.stem`."""
        if self.matrix_unit:
            return super().stem(scaled, left, right, band)
        return WinogradStem(self, scaled, left, right, band)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`FoldedEngine.attend`."""
        return attend(queries, keys, values, self.fused)


class WinogradStem:
    """Rows of the stem's output, from the top; the rows that the next ones need are kept, nothing is computed twice."""

    def __init__(self, engine: CpuEngine, scaled: Tensor, left: int, right: int, band: int) -> None:
        self.engine = engine
        self.height, whole = scaled.shape[1:]
        # The strip with its halo at both sides.
        low, high = max(0, left - engine.halo), min(whole, right + engine.halo)
        self.strip = slice(left - low, right - low)
        self.width = high - low
        rows, columns = (axis_coordinates(n, scaled.device) for n in scaled.shape[1:])
        self.step = min(_stem_rows(self.width), -(-band // TILE) * TILE)
        self.colours = rearrange(scaled[:, :, low:high], "c h w -> h w c").contiguous()
        columns = columns[low:high]
        self.row_code = self._axis_code(rows, 0)  # (H, 2 F)
        count, code = engine.frequencies.numel(), engine.code_norm[0].numel()
        padded = _padded(self.width)
        self.raw = self.colours.new_empty(self.step, self.width, code)
        self.raw[..., 2 * count : 4 * count] = self._axis_code(columns, 1)
        # Code rows y-1 .. y+step and first-layer rows y-1 .. y+step+3, with a column of zero padding at each side.
        self.code = self.colours.new_zeros(self.step + 2, padded, code)
        self.hidden = self.colours.new_zeros(self.step + TILE + 1, padded, engine.width)
        self.result = self.colours.new_empty(self.step, padded - 2, engine.width)
        self.space = Workspace()
        self.coded = self.layered = 0  # rows of the image that have been coded, and been through the first layer
        self._code_rows(1, 1)
        self._first_layer(1, TILE)

    def read(self, count: int) -> Tensor:
        """The next ``count`` rows, (count * columns, D); only the last call may take no multiple of 4."""
        out: Tensor = self.result.new_empty(count, self.width, self.engine.width, dtype=self.engine.dtype)
        for part in out.split(self.step):
            rows = -(-len(part) // TILE) * TILE
            self._first_layer(TILE + 1, rows)
            result = self.result[:rows]
            self.engine.layer2(self.hidden[: rows + 2], result, self.space)
            part.copy_(result[: len(part), : self.width]).relu_()
            self.hidden[: TILE + 1] = self.hidden[rows : rows + TILE + 1].clone()
        return out[:, self.strip].reshape(-1, self.engine.width)

    def _axis_code(self, axis: Tensor, value: int) -> Tensor:
        angles = axis[:, None] * self.engine.frequencies
        phases = self.engine.phases[:, value]
        return torch.cat([(angles + phases[0]).sin(), (angles + phases[1]).cos()], dim=1)

    def _code_rows(self, start: int, rows: int) -> None:
        """The next ``rows`` rows of the normalised code into ``code[start:]``, zeros below the image."""
        top = self.coded
        inside = max(0, min(rows, self.height - top))
        raw, colours = self.raw[:inside], self.colours[top : top + inside]
        count = self.engine.frequencies.numel()
        raw[..., : 2 * count] = self.row_code[top : top + inside, None]
        angles = colours[..., None] * self.engine.frequencies  # (rows, W, 3, F)
        sine, cosine = self.engine.phases[:, 2:]
        split = raw[..., 4 * count : 10 * count].unflatten(-1, (2, 3, count))
        torch.sin(angles + sine, out=split[..., 0, :, :])
        torch.cos(angles + cosine, out=split[..., 1, :, :])
        raw[..., 10 * count :] = colours
        target = self.code[start : start + rows]
        target[:inside, 1 : self.width + 1] = F.layer_norm(raw, raw.shape[-1:], *self.engine.stem_norm)
        target[inside:] = 0
        self.coded += rows

    def _first_layer(self, start: int, rows: int) -> None:
        """The next ``rows`` rows of the first layer into ``hidden[start:]``, zeros outside the image."""
        self._code_rows(2, rows)
        target = self.hidden[start : start + rows]
        inside = max(0, min(rows, self.height - self.layered))
        if inside:
            self.engine.layer1(self.code[: rows + 2], target[:, 1:-1], self.space)
            target.relu_()
        target[inside:] = 0
        target[:, self.width + 1 :] = 0
        self.code[:2] = self.code[rows : rows + 2].clone()
        self.layered += rows


def _stem_rows(width: int) -> int:
    return max(TILE, STEM_PIXELS // _padded(width) // TILE * TILE)


def _padded(width: int) -> int:
    """Columns of whole tiles, with the zero padding at both sides."""
    return -(-width // TILE) * TILE + 2


def _by_axis(count: int) -> Tensor:
    """Our order of the code's channels, as indices into the model's: sines and cosines of one value side by side."""
    frequency = torch.arange(count, device="cpu") * 5
    sine = [frequency + value for value in range(5)]
    cosine = [frequency + value + 5 * count for value in range(5)]
    colours = torch.arange(10 * count, 10 * count + 3, device="cpu")
    return torch.cat([sine[0], cosine[0], sine[1], cosine[1], *sine[2:], *cosine[2:], colours])
