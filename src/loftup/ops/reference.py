"""The kernels' operations written out in plain PyTorch, everything materialised: what they are tested against.

Any device and any float dtype, float64 for the truth in the tests. Nothing here is meant to be fast or lean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v, the softmax in float32 or wider.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, T, d).
        v: (B, heads, T, d).
        scale: a factor on the scores.

    Returns:
        (B, heads, N, d) in the dtype of ``q``.
    """
    scores = (q @ k.transpose(-2, -1)).to(_at_least_float32(q.dtype)) * scale
    return scores.softmax(dim=-1).to(q.dtype) @ v


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
    """Attention half of a block (paper, section 1.6): x + out_proj(attention(LN(x) Wq + bq, k, v)).

    Args:
        x: (B, N, D), the residual stream.
        norm_weight: (D,), with ``norm_bias`` (D,) the LayerNorm's.
        norm_bias: (D,).
        q_weight: (heads * d, D), laid out as in ``nn.Linear``.
        q_bias: (heads * d,).
        k: (B, heads, T, d), projected.
        v: (B, heads, T, d), projected.
        out_weight: (D, heads * d).
        out_bias: (D,).
        eps: of the LayerNorm.
        scale: a factor on the scores.

    Returns:
        (B, N, D) in the dtype of ``x``.
    """
    heads = k.shape[1]
    q = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), q_weight, q_bias)
    attended = cross_attention(q.view(*q.shape[:2], heads, k.shape[3]).transpose(1, 2), k, v, scale)
    return x + F.linear(attended.transpose(1, 2).flatten(-2), out_weight, out_bias)


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
    """Feed-forward half of a block (paper, section 1.6): x + W2 gelu(W1 LN(x) + b1) + b2, the exact GELU.

    Args:
        x: (B, N, D), the residual stream.
        norm_weight: (D,).
        norm_bias: (D,).
        weight_1: (C, D).
        bias_1: (C,).
        weight_2: (D, C).
        bias_2: (D,).
        eps: of the LayerNorm.

    Returns:
        (B, N, D) in the dtype of ``x``.
    """
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight_1, bias_1)
    return x + F.linear(F.gelu(hidden), weight_2, bias_2)


def fourier_code(values: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    """Fourier code of (row, column, r, g, b) with the colours appended (paper, section 1.3).

    Product and sum are rounded one after the other in the dtype of ``values``. The published weights were trained with
    float32 angles, whose spacing at e^10 is 0.002, so the rounding of the angle is part of the function.

    Args:
        values: (..., 5).
        frequencies: (F,).
        phases: (2, 5, F) in memory, for sine and cosine; each is read flat, as if it were (F, 5): the checkpoints' way.

    Returns:
        (..., 10 F + 3): sines, cosines (frequency outer, value inner), colours.
    """
    angles = (frequencies[:, None] * values[..., None, :]).flatten(-2)  # (..., 5 F)
    sine, cosine = phases.reshape(2, -1)
    return torch.cat([(angles + sine).sin(), (angles + cosine).cos(), values[..., 2:]], dim=-1)


def guidance(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    frequencies: Tensor,
    phases: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    channels: int,
) -> Tensor:
    """LayerNorm of the Fourier code of a band of the image: what the stem's first convolution reads.

    Args:
        image: (B, 3, H, W), float32 or float64, already scaled to [-0.5, 0.5].
        rows: (H,), the rows' coordinates: a slice of the whole axis.
        columns: (W,), the columns'.
        frequencies: (F,).
        phases: (2, 5, F).
        weight: (10 F + 3,).
        bias: (10 F + 3,).
        eps: of the LayerNorm.
        dtype: of the result.
        channels: at least 10 F + 3; zeros fill the rest.

    Returns:
        (B, H * W, channels) in ``dtype``.
    """
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).expand(len(image), -1, -1, -1)
    code = fourier_code(torch.cat([coordinates, image.movedim(1, -1)], -1), frequencies, phases).flatten(1, 2)
    normed = F.layer_norm(code, code.shape[-1:], weight.to(code.dtype), bias.to(code.dtype), eps)
    return F.pad(normed, (0, channels - normed.shape[-1])).to(dtype)


def head_norm(features: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float) -> None:
    """LayerNorm over the channels of each pixel, written into a band of channel-first features.

    Args:
        features: (B, H * W, C).
        weight: (C,).
        bias: (C,).
        out: (B, C, H, W), any strides and any float dtype; overwritten.
        eps: of the LayerNorm.
    """
    working = _at_least_float32(features.dtype)
    normed = F.layer_norm(features.to(working), features.shape[-1:], weight.to(working), bias.to(working), eps)
    out.copy_(normed.transpose(1, 2).reshape(out.shape))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
