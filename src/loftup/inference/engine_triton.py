"""The CUDA engine: Triton kernels around PyTorch's convolutions.

Guidance code and its norm in one kernel, channels-last convolutions in the module's dtype, one kernel for norm, query
projection and attention, and the head's norm written straight into the result. Checked on an H200 and in Triton's
interpreter.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..networks.layers import Box, axis_coordinates
from ..ops.triton_attention import attention_block
from ..ops.triton_linear import feed_forward
from ..ops.triton_pixels import guidance, head_norm
from .engine import FoldedEngine, KeyValue
from .fold import FoldedNetwork

__all__ = ["TritonEngine"]


class TritonEngine(FoldedEngine):
    """See :class:`FoldedEngine`.

    Args:
        weights: folded weights on a CUDA device (or on the CPU for Triton's interpreter).
        dtype: float16, bfloat16 or float32.
    """

    in_threads = False  # the interpreter of Triton may not bear it

    def __init__(self, weights: FoldedNetwork, dtype: torch.dtype) -> None:
        super().__init__(weights, dtype)
        ones = torch.ones(self.width, dtype=dtype, device=weights.code[0].device)
        self.plain_norm = ones, torch.zeros_like(ones)  # the affine part is in the linear layers already
        # Tensor cores want channels in multiples of 8: zeros behind the code's 203.
        self.code_channels = -(-self.code_norm[0].numel() // 8) * 8
        padded = F.pad(self.conv1[0], (0, 0, 0, 0, 0, self.code_channels - self.code_norm[0].numel()))
        self.padded_conv1 = padded.contiguous(memory_format=torch.channels_last), self.conv1[1]

    def first_layer(self, scaled: Tensor, box: Box) -> Tensor:
        """See :meth:`FoldedEngine.first_layer`."""
        top, left, bottom, right = box
        rows = axis_coordinates(scaled.shape[1], scaled.device)[top:bottom]
        columns = axis_coordinates(scaled.shape[2], scaled.device)[left:right]
        part = scaled[None, :, top:bottom, left:right]
        code = guidance(part, rows, columns, self.guidance, self.code_norm, 1e-5, self.dtype, self.code_channels)
        image = rearrange(code, "1 (h w) c -> 1 c h w", w=right - left)  # channels last in memory
        return F.conv2d(image, *self.padded_conv1, padding=1).relu_()

    def refine(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """See :meth:`FoldedEngine.refine`."""
        x = x[None]
        for block, (keys, values) in zip(self.blocks, memory, strict=True):
            x = attention_block(x, self.plain_norm, block["query"], keys[None], values[None], block["out"], 1e-5, 1.0)
            x = feed_forward(x, self.plain_norm, block["up"], block["down"], 1e-5)
        return x[0]

    def write(self, queries: Tensor, memory: list[KeyValue], out: Tensor) -> None:
        """See :meth:`FoldedEngine.write`."""
        if out.device != queries.device or out.dtype == torch.float64:
            super().write(queries, memory, out)
            return
        projected = self.project(self.refine(queries, memory))
        head_norm(projected[None], self.head_norm, out[None], 1e-6)
