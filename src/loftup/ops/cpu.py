"""Backend "cpu": half a block at a time on tiles of pixels; the score tile stays in cache, no score matrix in memory.

Measured on two AVX-512 cores with bfloat16: on tall matrices oneDNN's 1x1 convolution beats the matrix product behind
``F.linear`` by 10-15% in float32; PyTorch's fused attention is best in float32 with head widths that 8 divides; in
bfloat16 two matrix products with a softmax between them are nearly twice as fast as that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import guidance, head_norm

__all__ = ["attend", "attention_block", "cross_attention", "feed_forward", "guidance", "head_norm", "linear"]

Function = TypeVar("Function", bound=Callable[..., Any])
PIXELS = 8192  # of a tile: some 13 MB an activation in float32
SCORES = 2**20  # elements of a score tile: 2 MB in bfloat16


def _without_autocast(function: Function) -> Function:
    # Autocast would lower some of the products and not others; the tensors' dtype says what is wanted.
    return torch.autocast("cpu", enabled=False)(function)  # type: ignore[no-any-return]


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
    """Softmax attention, the scale already in the queries.

    Args:
        queries: (M, heads * d), contiguous.
        keys: (heads, T, d).
        values: (heads, T, d).

    Returns:
        (M, heads * d).
    """
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


@_without_autocast
def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As ``reference.cross_attention``."""
    batch, heads, _, depth = q.shape
    padding = (0, padded_width(depth, q.dtype) - depth)
    k, v = F.pad(k, padding).contiguous(), F.pad(v, padding).contiguous()
    out = torch.empty_like(q)
    for index in range(batch):
        for start in range(0, q.shape[2], PIXELS):
            part = slice(start, start + PIXELS)
            rows = F.pad(q[index, :, part] * scale, padding).transpose(0, 1).flatten(1).contiguous()
            attended = attend(rows, k[index], v[index]).unflatten(1, (heads, -1))
            out[index, :, part] = attended[..., :depth].transpose(0, 1)
    return out


@_without_autocast
def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k: Tensor,
    v: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """As ``reference.attention_block``."""
    out = torch.empty_like(x)
    for index in range(len(x)):
        for rows, target in zip(x[index].split(PIXELS), out[index].split(PIXELS), strict=True):
            normal = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
            queries = linear(normal, q_weight, q_bias).mul_(scale)
            torch.add(linear(attend(queries, k[index], v[index]), out_weight, out_bias), rows, out=target)
    return out


@_without_autocast
def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    eps: float,
) -> Tensor:
    """As ``reference.feed_forward``."""
    out = torch.empty_like(x)
    for index in range(len(x)):
        for rows, target in zip(x[index].split(PIXELS), out[index].split(PIXELS), strict=True):
            hidden = linear(F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps), weight_1, bias_1)
            torch.add(linear(F.gelu(hidden), weight_2, bias_2), rows, out=target)
    return out


def can_run_cpu(*tensors: Tensor, head_width: int | None = None) -> str | None:
    """None if this backend can take these tensors, else the reason why not."""
    if tensors[0].device.type != "cpu":
        return f"the tensors are on {tensors[0].device}"
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    if torch.compiler.is_compiling():
        return "its loops over tiles are not for torch.compile"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it computes no gradients: use backend='torch' to train, or torch.no_grad()"
    return None
