"""Attention by PyTorch's own fused kernels: any device, any float dtype, and the one to train with."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_attention"]


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v by PyTorch's choice of kernel; no score matrix on the CPU and on CUDA.

    CUDA's memory-saving kernels want head widths that 8 divides; LoftUp's are 101, 133, 197. Zero columns change no
    score and are cut off again.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, T, d).
        v: (B, heads, T, d).
        scale: a factor on the scores.

    Returns:
        (B, heads, N, d) in the dtype of ``q``.
    """
    width = q.shape[-1]
    if q.is_cuda and width % 8:
        q, k, v = (F.pad(tensor, (0, -width % 8)) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]
