"""The CUDA engine: Triton kernels around PyTorch's convolutions.

Guidance code and its norm in one kernel, channels-last convolutions in the module's dtype, one kernel for norm, query
projection and attention, and the head's norm written straight into the result. Checked in Triton's interpreter; no GPU
has run it yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .engine import EagerEngine, KeyValue
from .fold import Weights

__all__ = ["TritonEngine"]


class TritonEngine(EagerEngine):
    """See :class:`EagerEngine`.

    Args:
        weights: folded weights on a CUDA device (or on the CPU for Triton's interpreter).
        dtype: float16, bfloat16 or float32.
    """

    name = "triton"

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__(weights, dtype)
        self.biases = weights.biases
        ones = torch.ones(self.width, dtype=dtype, device=weights.biases.device)
        self.no_affine = ones, torch.zeros_like(ones)  # it is in the linear layers already
        # Tensor cores want channels in multiples of 8: zeros behind the code's 203.
        self.code_channels = -(-self.code_norm[0].numel() // 8) * 8
        padded = F.pad(self.conv1[0], (0, 0, 0, 0, 0, self.code_channels - self.code_norm[0].numel()))
        self.padded_conv1 = padded.contiguous(memory_format=torch.channels_last), self.conv1[1]

    def first_layer(self, guidance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """See :meth:`EagerEngine.first_layer`."""
        code = ops.guidance(
            guidance[None],
            rows,
            columns,
            self.frequencies,
            self.biases,
            *self.code_norm,
            dtype=self.dtype,
            channels=self.code_channels,
            backend="triton",
        )
        image = code.unflatten(1, (len(rows), len(columns))).permute(0, 3, 1, 2)  # channels last in memory
        return F.conv2d(image, *self.padded_conv1, padding=1).relu_()

    def refine(self, x: Tensor, memory: list[KeyValue]) -> Tensor:
        """See :meth:`EagerEngine.refine`."""
        x = x[None]
        for block, (keys, values) in zip(self.blocks, memory, strict=True):
            x = ops.attention_block(
                x,
                *self.no_affine,
                *block["query"],
                keys[None],
                values[None],
                *block["out"],
                scale=1.0,
                backend="triton",
            )
            x = ops.feed_forward(x, *self.no_affine, *block["up"], *block["down"], backend="triton")
        return x[0]

    def write(self, x: Tensor, memory: list[KeyValue], out: Tensor) -> None:
        """See :meth:`EagerEngine.write`."""
        if out.device != x.device or out.dtype == torch.float64:
            super().write(x, memory, out)
            return
        projected = self.project(self.refine(x, memory))
        ops.head_norm(projected[None], *self.head_norm, out=out[None], backend="triton")
