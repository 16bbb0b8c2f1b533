"""The Triton kernels' operations in plain PyTorch, everything materialised: what the kernels are tested against.

Any device and any float dtype, float64 for the truth in the tests. Nothing here is meant to be fast or lean. Weights
and biases come in pairs, laid out as in ``nn.Linear`` and ``nn.LayerNorm``. Inputs are left as they were.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Code",
    "Pair",
    "attention_block",
    "cross_attention",
    "feed_forward",
    "fourier_code",
    "guidance",
    "head_norm",
]

Pair = tuple[Tensor, Tensor]  # weight and bias
Code = tuple[Tensor, Tensor]  # frequencies (F,) and phases (2, 5, F)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As :func:`loftup.ops.attention.cross_attention`, the softmax in float32 or wider."""
    scores = (q @ k.mT).to(_at_least_float32(q.dtype)) * scale
    return scores.softmax(dim=-1).to(q.dtype) @ v


def attention_block(
    x: Tensor, norm: Pair, query: Pair, k: Tensor, v: Tensor, out: Pair, eps: float, scale: float
) -> Tensor:
    """Attention half of a block (paper, section 1.6): x + out(attention(query(LN(x)), k, v)).

    Args:
        x: (B, N, D), the residual stream.
        norm: (D,) each.
        query: (heads * d, D) and (heads * d,).
        k: (B, heads, T, d), T > 0, projected.
        v: (B, heads, T, d), projected.
        out: (D, heads * d) and (D,).
        eps: of the LayerNorm.
        scale: a factor on the scores.
    """
    q = F.linear(F.layer_norm(x, x.shape[-1:], *norm, eps), *query).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
    return x + F.linear(cross_attention(q, k, v, scale).transpose(1, 2).flatten(-2), *out)


def feed_forward(x: Tensor, norm: Pair, up: Pair, down: Pair, eps: float) -> Tensor:
    """Feed-forward half of a block (paper, section 1.6): x + down(gelu(up(LN(x)))), the exact GELU.

    Args:
        x: (B, N, D), the residual stream.
        norm: (D,) each.
        up: (C, D) and (C,).
        down: (D, C) and (D,).
        eps: of the LayerNorm.
    """
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *norm, eps), *up)), *down)


def fourier_code(values: Tensor, code: Code) -> Tensor:
    """Fourier code of (row, column, r, g, b) with the colours appended (paper, section 1.3).

    Product and sum are rounded one after the other in the dtype of ``values``. The published weights were trained with
    float32 angles, whose spacing at e^10 is 0.002, so the rounding of the angle is part of the function.

    Args:
        values: (..., 5).
        code: phases are read flat, as if they were (2, F, 5): the checkpoints' way.

    Returns:
        (..., 10 F + 3): sines, cosines (frequency outer, value inner), colours.
    """
    frequencies, phases = code
    angles = (frequencies[:, None] * values[..., None, :]).flatten(-2)  # (..., 5 F)
    sine, cosine = phases.reshape(2, -1)
    return torch.cat([(angles + sine).sin(), (angles + cosine).cos(), values[..., 2:]], dim=-1)


def guidance(
    image: Tensor, rows: Tensor, columns: Tensor, code: Code, norm: Pair, eps: float, dtype: torch.dtype, channels: int
) -> Tensor:
    """LayerNorm of the Fourier code of a band of the image: what the stem's first convolution reads.

    Args:
        image: (B, 3, H, W), float32 or float64, already scaled to [-0.5, 0.5].
        rows: (H,), the rows' coordinates: a slice of the whole axis.
        columns: (W,), the columns'.
        code: of the guidance, float32 or float64.
        norm: (10 F + 3,) each.
        eps: of the LayerNorm.
        dtype: of the result.
        channels: at least 10 F + 3; zeros fill the rest.

    Returns:
        (B, H * W, channels) in ``dtype``.
    """
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).expand(len(image), -1, -1, -1)
    x = fourier_code(torch.cat([coordinates, image.movedim(1, -1)], -1), code).flatten(1, 2)
    weight, bias = (affine.to(x.dtype) for affine in norm)
    return F.pad(F.layer_norm(x, x.shape[-1:], weight, bias, eps), (0, channels - x.shape[-1])).to(dtype)


def head_norm(features: Tensor, norm: Pair, out: Tensor, eps: float) -> None:
    """LayerNorm over the channels of each pixel, written into a band of channel-first features.

    Args:
        features: (B, H * W, C).
        norm: (C,) each.
        out: (B, C, H, W), any strides and any float dtype; overwritten.
        eps: of the LayerNorm.
    """
    dtype = _at_least_float32(features.dtype)
    weight, bias = (affine.to(dtype) for affine in norm)
    normal = F.layer_norm(features.to(dtype), features.shape[-1:], weight, bias, eps)
    out.copy_(normal.transpose(1, 2).reshape(out.shape))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
