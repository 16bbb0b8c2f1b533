"""The two ends of the network at full resolution in Triton: the Fourier guidance going in, the head's norm going out.

Both are bound by memory: as separate PyTorch steps the guidance writes and reads its 203 float32 channels five times
(41 MB each at 224x224), and the norm its C channels three times; here the result alone is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .reference import Code, Pair
from .triton_common import INTERPRETED, alignment, round_to


@triton.jit
def _sin(b_x):
    # __nv_sinf: below 105 615 a three-step reduction by pi/2 with fused multiply-adds, beyond it Payne-Hanek; 2 ulp
    # either way, and the angles here stay below 22 030. Named rather than left to tl.sin, whose lowering is Triton's
    # choice: sin.approx, good to 2^-20.5 only in [-pi, pi], would turn the high frequencies into noise.
    return tl.sin(b_x) if INTERPRETED else libdevice.sin(b_x)


@triton.jit
def _cos(b_x):
    return tl.cos(b_x) if INTERPRETED else libdevice.cos(b_x)


@triton.jit
def _guidance_kernel(
    p_image, p_rows, p_columns, p_frequencies, p_phases, p_gamma, p_beta, p_out,
    stride_ib, stride_ic, stride_ih, stride_iw, WIDTH, N, tiles, eps,
    HALF: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of one image: sin and cos of HALF angles each, the three colours, LayerNorm over all of them."""
    i_m = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    o_h, o_w = o_n // WIDTH, o_n % WIDTH
    p_pixel = p_image + i_b * stride_ib + o_h.to(tl.int64) * stride_ih + o_w.to(tl.int64) * stride_iw
    # [BLOCK_M]
    b_row = tl.load(p_rows + o_h, mask=m_n, other=0.0)
    b_column = tl.load(p_columns + o_w, mask=m_n, other=0.0)
    b_red = tl.load(p_pixel, mask=m_n, other=0.0)
    p_pixel += stride_ic
    b_green = tl.load(p_pixel, mask=m_n, other=0.0)
    p_pixel += stride_ic
    b_blue = tl.load(p_pixel, mask=m_n, other=0.0)
    # Frequency-major: channel c belongs to frequency c // 5 and value c % 5.
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < HALF
    o_value = (o_c % 5)[None, :]
    # [BLOCK_M, BLOCK_C]
    b_value = tl.where(o_value == 0, b_row[:, None], b_column[:, None])
    b_value = tl.where(o_value == 2, b_red[:, None], b_value)
    b_value = tl.where(o_value == 3, b_green[:, None], b_value)
    b_value = tl.where(o_value == 4, b_blue[:, None], b_value)
    b_product = b_value * tl.load(p_frequencies + o_c // 5, mask=m_c, other=0.0)[None, :]
    b_sin = _sin(b_product + tl.load(p_phases + o_c, mask=m_c, other=0.0)[None, :])
    b_cos = _cos(b_product + tl.load(p_phases + HALF + o_c, mask=m_c, other=0.0)[None, :])
    # [BLOCK_M, BLOCK_REST]: the colours, then the zeros that pad the row to CHANNELS.
    o_rest = tl.arange(0, BLOCK_REST)
    b_rest = tl.where(
        (o_rest == 0)[None, :], b_red[:, None], tl.where((o_rest == 1)[None, :], b_green[:, None], b_blue[:, None])
    )
    m_colour = (o_rest < 3)[None, :]
    # [BLOCK_M]
    b_sum = tl.sum(tl.where(m_c[None, :], b_sin + b_cos, 0.0), axis=1)
    b_mean = ((b_sum + (b_red + b_green + b_blue)) / (2 * HALF + 3))[:, None]
    b_sin = tl.where(m_c[None, :], b_sin - b_mean, 0.0)
    b_cos = tl.where(m_c[None, :], b_cos - b_mean, 0.0)
    b_rest = tl.where(m_colour, b_rest - b_mean, 0.0)
    b_squares = tl.sum(b_sin * b_sin + b_cos * b_cos, axis=1) + tl.sum(b_rest * b_rest, axis=1)
    b_rstd = (1.0 / tl.sqrt(b_squares / (2 * HALF + 3) + eps))[:, None]

    p_row = p_out + i_b * N * CHANNELS + o_n.to(tl.int64)[:, None] * CHANNELS
    m_out = m_n[:, None] & m_c[None, :]
    b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(p_beta + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_out = round_to(b_sin * b_rstd * b_gamma + b_beta, p_out.dtype.element_ty)
    tl.store(p_row + o_c[None, :], b_out, mask=m_out)
    b_gamma = tl.load(p_gamma + HALF + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(p_beta + HALF + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_out = round_to(b_cos * b_rstd * b_gamma + b_beta, p_out.dtype.element_ty)
    tl.store(p_row + (HALF + o_c)[None, :], b_out, mask=m_out)
    o_rest = 2 * HALF + o_rest
    b_gamma = tl.load(p_gamma + o_rest, mask=o_rest < 2 * HALF + 3, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(p_beta + o_rest, mask=o_rest < 2 * HALF + 3, other=0.0).to(tl.float32)[None, :]
    b_out = round_to(b_rest * b_rstd * b_gamma + b_beta, p_out.dtype.element_ty)
    tl.store(p_row + o_rest[None, :], b_out, mask=m_n[:, None] & (o_rest < CHANNELS)[None, :])


@triton.jit
def _head_norm_kernel(
    p_x, p_gamma, p_beta, p_out, stride_xb, stride_xn, stride_xc, stride_ob, stride_oc, stride_oh, stride_ow,
    WIDTH, N, tiles, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """LayerNorm of a tile of pixels, stored channel-first: loads run along the channels, stores along the pixels."""
    i_m = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_n, m_c = o_n < N, o_c < C
    m_tile = m_n[:, None] & m_c[None, :]
    o_c64 = o_c.to(tl.int64)[None, :]
    p_row = p_x + i_b * stride_xb + o_n.to(tl.int64)[:, None] * stride_xn * ALIGN
    # [BLOCK_M, BLOCK_C]
    b_x = tl.load(p_row + o_c64 * stride_xc, mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.where(m_c[None, :], b_x - (tl.sum(b_x, axis=1) / C)[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
    b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_x = b_x * b_rstd[:, None] * b_gamma[None, :] + b_beta[None, :]
    if FLAT:
        o_pixel = o_n.to(tl.int64) * stride_ow
    else:
        o_pixel = (o_n // WIDTH).to(tl.int64) * stride_oh + (o_n % WIDTH).to(tl.int64) * stride_ow
    p_o = p_out + i_b * stride_ob + o_pixel[:, None] + o_c64 * stride_oc
    tl.store(p_o, round_to(b_x, p_out.dtype.element_ty), mask=m_tile)


def guidance(
    image: Tensor, rows: Tensor, columns: Tensor, code: Code, norm: Pair, eps: float, dtype: torch.dtype, channels: int
) -> Tensor:
    """As :func:`loftup.ops.reference.guidance`."""
    frequencies, phases = code
    batch, _, height, width = image.shape
    pixels, half = height * width, 5 * frequencies.shape[0]
    out = torch.empty((batch, pixels, channels), dtype=dtype, device=image.device)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(pixels, 16)
    # Without fusion the angle's product and sum are rounded one by one, as in PyTorch: a fused multiply-add would shift
    # the highest frequencies by up to 0.001. The library's own fused operations are explicit and stay.
    _guidance_kernel[(tiles * batch,)](
        image, rows.contiguous(), columns.contiguous(), frequencies.contiguous(), phases.contiguous(),
        norm[0].contiguous(), norm[1].contiguous(), out, *image.stride(), width, pixels, tiles, eps,
        HALF=half, CHANNELS=channels, BLOCK_M=16, BLOCK_C=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(channels - 2 * half), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def head_norm(features: Tensor, norm: Pair, out: Tensor, eps: float) -> None:
    """As :func:`loftup.ops.reference.head_norm`."""
    batch, pixels, channels = features.shape
    if features.numel() == 0:
        return
    height, width = out.shape[2:]
    # Rows that follow each other in memory are one long row; without the division Triton sees that neighbouring pixels
    # have neighbouring addresses, and stores them together.
    flat = height == 1 or out.stride(2) == width * out.stride(3)
    block_c = triton.next_power_of_2(channels)
    block_m = min(64, max(8, 32768 // block_c))
    tiles = triton.cdiv(pixels, block_m)
    align = alignment(features.stride(1))
    _head_norm_kernel[(tiles * batch,)](
        features, norm[0].contiguous(), norm[1].contiguous(), out, features.stride(0), features.stride(1) // align,
        features.stride(2), *out.stride(), width, pixels, tiles, eps,
        C=channels, BLOCK_M=block_m, BLOCK_C=block_c, ALIGN=align, FLAT=flat, num_warps=8,
    )  # fmt: skip
