"""Layers and attention on a CPU: tiles of scores that stay in cache, no score matrix in memory.

Measured on two AVX-512 cores with bfloat16: on tall matrices oneDNN's 1x1 convolution beats the matrix product behind
``F.linear`` by 10-15% in float32; PyTorch's fused attention is best in float32 with head widths that 8 divides; in
bfloat16 two matrix products with a softmax between them are nearly twice as fast as that kernel. With a matrix unit
(Intel's AMX) it is the other way round: there the fused attention is 1.4 times as fast as the two products at head
widths that 16 divides, and a direct bfloat16 convolution three times as fast as Winograd in float32.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Direct", "attend", "has_matrix_unit", "linear", "padded_width"]

SCORES = 2**20  # elements of a score tile: 2 MB in bfloat16


@functools.cache
def has_matrix_unit() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices by a unit of their own (AMX) that PyTorch uses."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # since torch 2.5
    allowed = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(found and allowed) and "AVX512" in torch.backends.cpu.get_cpu_capability()


def padded_width(width: int, dtype: torch.dtype, matrix_unit: bool) -> int:
    """The head width that :func:`attend` is fastest at: a multiple of 8 in float32, of 16 for a matrix unit."""
    step = 8 if dtype == torch.float32 else 16 if matrix_unit else 1
    return -(-width // step) * step


class Direct:
    """A 3x3 convolution with bias by PyTorch, called like :class:`loftup.ops.winograd.Winograd`.

    Args:
        weight: (N, K, 3, 3), in the dtype to compute in.
        bias: (N,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.dtype = weight.contiguous(memory_format=torch.channels_last), bias, weight.dtype

    def bytes_per_pixel(self) -> int:
        """Scratch for each output pixel: the result before it is copied, and oneDNN's own copy of the input."""
        return self.dtype.itemsize * sum(self.weight.shape[:2])

    def __call__(self, x: Tensor, y: Tensor, space: object) -> None:
        """Convolve (n + 2, m + 2, K), contiguous, without padding into (n, m, N), any strides."""
        out = F.conv2d(x.permute(2, 0, 1)[None], self.weight, self.bias)  # channels last in memory
        y.copy_(out[0].permute(1, 2, 0))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for a tall contiguous matrix (M, K), as a 1x1 convolution; returns (M, N), contiguous."""
    if len(x) == 0:
        return x.new_empty(0, len(weight))
    # Made in this way the image has channels-last strides, for which oneDNN neither copies nor reorders it.
    image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)  # (1, K, 1, M), channels last in memory
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, 0]


def attend(queries: Tensor, keys: Tensor, values: Tensor, fused: bool) -> Tensor:
    """Softmax attention of contiguous (M, heads * d), scaled already, to (heads, T, d); returns (M, heads * d).

    By PyTorch's fused kernel, or by two products a head with a softmax between them.
    """
    heads, tokens, depth = keys.shape
    if fused:
        split = queries.view(1, -1, heads, depth).transpose(1, 2)
        out = F.scaled_dot_product_attention(split, keys[None], values[None], scale=1.0)
        return out.transpose(1, 2).reshape(queries.shape)  # the kernel writes (M, heads, d): a view
    out = torch.empty_like(queries)
    step = max(64, SCORES // tokens // 64 * 64)
    scores = queries.new_empty(min(step, len(queries)), tokens)
    for rows, target in zip(queries.split(step), out.split(step), strict=True):
        tile = scores[: len(rows)]
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            torch.mm(rows[:, part], keys[head].mT, out=tile)
            torch.softmax(tile, -1, out=tile)
            torch.mm(tile, values[head], out=target[:, part])
    return out
