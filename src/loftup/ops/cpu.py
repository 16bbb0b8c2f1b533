"""Attention on a CPU: tiles of scores that stay in cache, no score matrix in memory.

Measured on one thread of processors with AVX-512: PyTorch's fused attention is the best in float32. In bfloat16 it
takes 1.4 to 2 times as long as two matrix products with a softmax between them, but not where the processor has a
matrix unit (Intel's AMX): there, at head widths that 16 divides, it is 1.3 times as fast as the two products, and a
direct bfloat16 convolution three times as fast as Winograd in float32. Without bfloat16 arithmetic the two products
take 16 times as long.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "has_bfloat16", "has_matrix_unit"]

SCORES = 2**20  # elements of a score tile: 2 MB in bfloat16


def has_bfloat16() -> bool:
    """Tell whether PyTorch computes in bfloat16 on this processor (some have AVX-512 for it, and no more)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def has_matrix_unit() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices by a unit of their own (AMX) that PyTorch uses."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # since torch 2.5
    return bool(found) and has_bfloat16() and "AVX512" in torch.backends.cpu.get_cpu_capability()


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
