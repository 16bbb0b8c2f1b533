"""Linear layers and attention on a CPU: tiles of scores that stay in cache, no score matrix in memory.

Measured on two AVX-512 cores with bfloat16: on tall matrices oneDNN's 1x1 convolution beats the matrix product behind
``F.linear`` by 10-15% in float32; PyTorch's fused attention is best in float32 with head widths that 8 divides; in
bfloat16 two matrix products with a softmax between them are nearly twice as fast as that kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "linear", "padded_width"]

SCORES = 2**20  # elements of a score tile: 2 MB in bfloat16


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The head width that :func:`attend` is fastest at: a multiple of 8 in float32, any in bfloat16."""
    return -(-width // 8) * 8 if dtype == torch.float32 else width


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for a tall contiguous matrix (M, K), as a 1x1 convolution; returns (M, N), contiguous."""
    if len(x) == 0:
        return x.new_empty(0, len(weight))
    # Made in this way the image has channels-last strides, for which oneDNN neither copies nor reorders it.
    image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)  # (1, K, 1, M), channels last in memory
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, 0]


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of contiguous (M, heads * d), scaled already, to (heads, T, d); returns (M, heads * d)."""
    heads, tokens, depth = keys.shape
    if queries.dtype == torch.float32:
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
