"""Linear layers in Triton with LayerNorm before, GELU or the residual after: the feed-forward half of a block.

Why not cuBLAS: its GELU epilogue is the tanh approximation and the published weights were trained with the exact one;
PyTorch's addmm adds a bias or a residual, not both; and rows of 404, 532 or 788 elements fail the 16-byte alignment of
its fast kernels.

Why two kernels and not one for LN + Linear + GELU + Linear: by arithmetic, not measurement, the two move 196 MB at
224x224 (D = 404, C = 384, bfloat16), 41 us at 4.8 TB/s, and multiply 31 GFLOP, 40 us at 790 TFLOP/s, so traffic hides
behind the products. A single one would spare the 77 MB of the hidden layer but hold 128 x 512 float32 sums a tile, all
the registers of a multiprocessor (twice that for D = 788), or halve the tile and with it the reuse of the weights.
LayerNorm is applied to the tile on its way to the tensor cores: written out instead it would cost 81 MB of traffic. It
is not folded into the weights, because x Wᵀ - mean * rowsum(W) cancels badly where the mean is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Pair
from .triton_common import alignment, dot, dot_precision, round_to, shared_memory


@triton.jit
def _row_statistics_kernel(
    p_x, p_mean, p_rstd, stride_xb, stride_xn, stride_xd, N, tiles, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Mean and 1/sqrt(variance + eps) of each row, in two passes over the row in registers."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    p_row = p_x + i_b * stride_xb + o_n.to(tl.int64)[:, None] * stride_xn * ALIGN
    # [BLOCK_M, BLOCK_D]
    b_x = tl.load(p_row + o_d.to(tl.int64)[None, :] * stride_xd, mask=m_n[:, None] & m_d[None, :], other=0.0).to(
        tl.float32
    )
    # [BLOCK_M]
    b_mean = tl.sum(b_x, axis=1) / D
    b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    tl.store(p_mean + i_b * N + o_n, b_mean, mask=m_n)
    tl.store(p_rstd + i_b * N + o_n, b_rstd, mask=m_n)


@triton.jit
def _linear_kernel(
    p_x, p_mean, p_rstd, p_gamma, p_beta, p_w, p_bias, p_residual, p_out,
    stride_xb, stride_xn, stride_xd, stride_w, stride_rb, stride_rn, stride_rd, stride_ob, stride_on,
    N, tiles_m, tiles_f,
    D: tl.constexpr, F: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_R: tl.constexpr, ALIGN_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The tiles of one row of tiles run side by side, so that all but the first find x in the L2 cache.
    i = tl.program_id(0)
    i_f, i_m = i % tiles_f, i // tiles_f % tiles_m
    i_b = (i // tiles_f // tiles_m).to(tl.int64)
    o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_n, m_f = o_n < N, o_f < F
    o_n64 = o_n.to(tl.int64)[:, None]
    if NORM:
        # [BLOCK_M]
        b_mean = tl.load(p_mean + i_b * N + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(p_rstd + i_b * N + o_n, mask=m_n, other=0.0)
    p_row = p_x + i_b * stride_xb + o_n64 * stride_xn * ALIGN_X
    p_w_row = p_w + o_f.to(tl.int64)[:, None] * stride_w * ALIGN_W
    # [BLOCK_M, BLOCK_F]
    b_acc = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    for o_k0 in range(0, D, BLOCK_K):
        o_k = o_k0 + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_row + o_k.to(tl.int64)[None, :] * stride_xd, mask=m_n[:, None] & m_k[None, :], other=0.0)
        if NORM:
            b_gamma = tl.load(p_gamma + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_beta = tl.load(p_beta + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_gamma[None, :] + b_beta[None, :]
            b_x = round_to(b_x, p_x.dtype.element_ty)
        # [BLOCK_F, BLOCK_K]
        b_w = tl.load(p_w_row + o_k[None, :], mask=m_f[:, None] & m_k[None, :], other=0.0)
        b_acc = dot(b_x, tl.trans(b_w), b_acc, PRECISION)
    b_acc += tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b_acc = 0.5 * b_acc * (1.0 + tl.erf(b_acc * 0.7071067811865476))
    m_out = m_n[:, None] & m_f[None, :]
    if RESIDUAL:
        p_r = p_residual + i_b * stride_rb + o_n64 * stride_rn * ALIGN_R + o_f.to(tl.int64)[None, :] * stride_rd
        b_acc += tl.load(p_r, mask=m_out, other=0.0).to(tl.float32)
    p_o = p_out + i_b * stride_ob + o_n64 * stride_on * ALIGN_O + o_f[None, :]
    tl.store(p_o, round_to(b_acc, p_out.dtype.element_ty), mask=m_out)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(variance + eps) over the last axis of x (B, N, D): two (B, N) tensors in float32."""
    batch, rows, width = x.shape
    mean, rstd = (torch.empty((batch, rows), dtype=torch.float32, device=x.device) for _ in range(2))
    block_d = triton.next_power_of_2(width)
    block_m = max(1, 8192 // block_d)
    align = alignment(x.stride(1))
    tiles = triton.cdiv(rows, block_m)
    _row_statistics_kernel[(tiles * batch,)](
        x, mean, rstd, x.stride(0), x.stride(1) // align, x.stride(2), rows, tiles, eps,
        D=width, BLOCK_M=block_m, BLOCK_D=block_d, ALIGN=align, num_warps=4,
    )  # fmt: skip
    return mean, rstd


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute residual + gelu(LN(x) weightᵀ + bias), LN, GELU and residual optional.

    ``norm`` is (mean, rstd, gamma, beta).

    Returns:
        (B, N, F); after a GELU, as another product reads them, rows lie a multiple of 16 elements apart.
    """
    batch, rows, width = x.shape
    features = weight.shape[0]
    pitch = -(-features // 16) * 16 if gelu else features
    out = torch.empty((batch, rows, pitch), dtype=x.dtype, device=x.device)[..., :features]
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    blocks = _choose_blocks(x.dtype, shared_memory(x.device))
    mean, rstd, gamma, beta = norm if norm is not None else (bias, bias, bias, bias)
    other = x if residual is None else residual
    tiles_m, tiles_f = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(features, blocks["BLOCK_F"])
    align = {"ALIGN_X": x.stride(1), "ALIGN_W": weight.stride(0), "ALIGN_R": other.stride(1), "ALIGN_O": out.stride(1)}
    align = {name: alignment(stride) for name, stride in align.items()}
    _linear_kernel[(tiles_f * tiles_m * batch,)](
        x, mean, rstd, gamma.contiguous(), beta.contiguous(), weight, bias.contiguous(), other, out,
        x.stride(0), x.stride(1) // align["ALIGN_X"], x.stride(2), weight.stride(0) // align["ALIGN_W"],
        other.stride(0), other.stride(1) // align["ALIGN_R"], other.stride(2),
        out.stride(0), out.stride(1) // align["ALIGN_O"], rows, tiles_m, tiles_f,
        D=width, F=features, NORM=norm is not None, GELU=gelu, RESIDUAL=residual is not None,
        PRECISION=dot_precision(x.dtype), **align, **blocks,
    )  # fmt: skip
    return out


def _choose_blocks(dtype: torch.dtype, shared: int) -> dict[str, int]:
    """128 x 128 tiles for half precision (two warpgroups of 64 rows); float32 goes through registers, so smaller."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_F": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    # A stage holds 128 x 64 of x and of the weights: 32 KB.
    stages = 3 if shared > 3 * 32 * 1024 + 16 * 1024 else 2
    return {"BLOCK_M": 128, "BLOCK_F": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}


def feed_forward(x: Tensor, norm: Pair, up: Pair, down: Pair, eps: float) -> Tensor:
    """As :func:`loftup.ops.reference.feed_forward`."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = linear(x, *up, norm=(*row_statistics(x, eps), *norm), gelu=True)
    return linear(hidden, *down, residual=x)
