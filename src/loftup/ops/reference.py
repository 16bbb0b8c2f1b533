"""The Triton kernels' operations in plain PyTorch, everything materialised: what the kernels are tested against.

Any device and any float dtype, float64 for the truth in the tests. Nothing here is meant to be fast or lean. Weights
and biases come in pairs, laid out as in ``nn.Linear`` and ``nn.LayerNorm``. Inputs are left as they were.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Box",
    "Cells",
    "Code",
    "Pair",
    "attention_block",
    "cross_attention",
    "feed_forward",
    "fourier_code",
    "guidance",
    "head_norm",
    "likeness",
    "pool",
    "windows",
]

Pair = tuple[Tensor, Tensor]  # weight and bias
Code = tuple[Tensor, Tensor]  # frequencies (F,) and phases (2, 5, F)
Box = tuple[int, int, int, int]  # top, left, bottom and right of pixels, the last two excluded


class Cells(NamedTuple):
    """All that one image's pixels look at in the attention of ``any``; "padded" is by the radius r at every side."""

    keys: Tensor  # (h + 2r, w + 2r, (1 + heads) * D), padded; the first round's come first
    constants: Tensor  # (h + 2r, w + 2r, 1 + heads), padded with very low ones
    sharpness: Tensor  # (h, w, 1 + heads), 1 / (2 width^2) of the bells in cells
    strength: Tensor  # (h, w, heads), factor on the agreement
    directions: Tensor  # (h + 2r, w + 2r, C), padded, of length 1
    values: Tensor  # (h + 2r, w + 2r, E), padded


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


def pool(codes: Tensor, box: Box, size: tuple[int, int], mean: Tensor, square: Tensor) -> None:
    """Add a box's part to the mean codes of an image's cells and to the means of their squares.

    A pixel belongs to the cell that its centre lies in; a cell without any has its nearest pixel.

    Args:
        codes: (rows, columns, D) of the box.
        box: of pixels.
        size: (H, W) of the image.
        mean: (h, w, D), added to.
        square: (h, w, D), added to.
    """
    top, left, bottom, right = box
    rows = _average(size[0], mean.shape[0], codes)[:, top:bottom]
    columns = _average(size[1], mean.shape[1], codes)[:, left:right]
    mean += torch.einsum("iy,jx,yxd->ijd", rows, columns, codes)
    square += torch.einsum("iy,jx,yxd->ijd", rows, columns, codes.square())


def _average(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length), the weights of pixels in the mean of their cell."""
    pixel, cell = torch.arange(length, device=like.device), torch.arange(cells, device=like.device)[:, None]
    inside = (2 * pixel + 1) * cells // (2 * length) == cell
    nearest = pixel == ((2 * cell + 1) * length // (2 * cells)).clamp(max=length - 1)
    inside = torch.where(inside.any(1, keepdim=True), inside, nearest).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def likeness(directions: Tensor, radius: int) -> Tensor:
    """Cosines of every cell with those of its window: (B, h + 2r, w + 2r, C), padded, to (B, h, w, (2r + 1)^2)."""
    side = 2 * radius + 1
    around = directions.unfold(1, side, 1).unfold(2, side, 1).flatten(-2)  # (B, h, w, C, K)
    own = directions[:, radius : directions.shape[1] - radius, radius : directions.shape[2] - radius]
    return (own[..., None, :] @ around)[..., 0, :]


def windows(codes: Tensor, shares: Tensor, cells: Cells, box: Box, size: tuple[int, int], out: Tensor) -> None:
    """Attention of a box's pixels to the windows around their cells, and the average of the windows' values.

    As :meth:`loftup.networks.universal.UniversalNetwork.attend`, pixel by pixel.

    Args:
        codes: (rows, columns, (1 + heads) * D) of the box.
        shares: (rows, columns, heads), of the heads in the weights, with sum 1.
        cells: of the image.
        box: of pixels.
        size: (H, W) of the image.
        out: (E, rows, columns), any strides and any float dtype; overwritten.
    """
    top, left, bottom, right = box
    h, w, rounds = cells.sharpness.shape
    radius = (cells.keys.shape[0] - h) // 2
    steps = torch.arange(-radius, radius + 1, device=codes.device)
    own, near, fade = [], [], []
    for first, last, length, count in ((top, bottom, size[0], h), (left, right, size[1], w)):
        pixel = torch.arange(first, last, device=codes.device)
        cell = (2 * pixel + 1) * count // (2 * length)
        offset = ((2 * pixel + 1) * count - (2 * cell + 1) * length).to(codes.dtype)[:, None] / (2 * length)
        own.append(cell)
        near.append(2 * offset * steps - steps.square())
        fade.append(2 * (1 - ((offset - steps) / (radius + 0.5)).square()).clamp(min=1e-6).log())
    near_sum, fade_sum = ((a[:, None, :, None] + b[None, :, None, :]).flatten(2) for a, b in (near, fade))
    side = 2 * radius + 1
    window = (torch.arange(side, device=codes.device)[:, None] * (w + 2 * radius) + steps + radius).flatten()
    places = (own[0][:, None] * (w + 2 * radius) + own[1])[..., None] + window
    keys, constants, directions, values = (
        table.flatten(0, 1)[places] for table in (cells.keys, cells.constants, cells.directions, cells.values)
    )
    sharpness, strength = (table[own[0][:, None], own[1]] for table in (cells.sharpness, cells.strength))
    keys, queries = keys.unflatten(-1, (rounds, -1)), codes.unflatten(-1, (rounds, -1))
    scores = 2 * torch.einsum("nmkrd,nmrd->nmrk", keys, queries) + constants.mT
    scores = scores + sharpness[..., None] * near_sum[:, :, None] + fade_sum[:, :, None]
    attention = scores[..., 0, :].softmax(-1)
    mean = (attention[..., None, :] @ directions)[..., 0, :]
    agreement = (directions @ mean[..., None])[..., 0] * mean.square().sum(-1, keepdim=True).clamp(min=1e-2).rsqrt()
    second = (scores[..., 1:, :] + strength[..., None] * agreement[..., None, :]).softmax(-1)
    weights = (shares[..., None] * second).sum(-2)
    out.copy_((weights[..., None, :] @ values)[..., 0, :].movedim(-1, 0))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
