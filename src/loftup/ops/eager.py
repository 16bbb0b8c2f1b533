"""Backend "torch": PyTorch's own fused kernels. Any device, any float dtype, and the one to train with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import feed_forward, guidance

__all__ = ["attention_block", "cross_attention", "feed_forward", "guidance", "head_norm"]


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As ``reference.cross_attention``, by PyTorch's choice of kernel; no score matrix on the CPU and on CUDA.

    CUDA's memory-saving kernels want head widths that 8 divides; LoftUp's are 101, 133, 197. Zero columns change no
    score and are cut off again.
    """
    width = q.shape[-1]
    if q.is_cuda and width % 8:
        q, k, v = (F.pad(tensor, (0, -width % 8)) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]


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
    q = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), q_weight, q_bias)
    attended = cross_attention(q.view(*q.shape[:2], k.shape[1], k.shape[3]).transpose(1, 2), k, v, scale)
    return x + F.linear(attended.transpose(1, 2).flatten(-2), out_weight, out_bias)


def head_norm(features: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float) -> None:
    """As ``reference.head_norm``; `layer_norm` itself works in float32, so half precision may go in as it is."""
    working = torch.promote_types(features.dtype, out.dtype)
    normed = F.layer_norm(features.to(working), features.shape[-1:], weight.to(working), bias.to(working), eps)
    out.copy_(normed.transpose(1, 2).reshape(out.shape))
