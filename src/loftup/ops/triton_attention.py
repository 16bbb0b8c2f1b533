"""Cross-attention from pixels to feature tokens in Triton, with the query projection inside it.

Many queries (50 thousand to a million pixels), few keys (256 to 5329 tokens), odd head widths (101, 133, 197):

- A program owns BLOCK_M pixels of one head and walks over the tokens with the online softmax, so the score matrix
  never reaches memory. Neighbouring programs differ in the head: the four that read the same pixels run together and
  three of them find the rows in the L2 cache.
- A head of width 101 starts at any element, so its rows can be read only two bytes at a time, too few for the
  asynchronous copies that feed the tensor cores. K and V are a few hundred to a few thousand rows, so `pack` first
  copies them to rows of padded width, zeros in the padding: aligned, unmasked, asynchronous loads in the loop.
- Widths are padded to BLOCK_D + TAIL, two powers of two (or TAIL = 0): 133 = 128 + 16 costs 144 columns, not 256.
- `attention_block`: LayerNorm and query projection of the tile happen in the kernel. By arithmetic, not measurement:
  separate kernels would write and read LN(x) and q, 160 MB at 224x224 (D = 404), 34 us at 4.8 TB/s beside about 90 us
  for the products of this half block at 600 TFLOP/s. In the kernel x is read once per head, three times from L2. Mean
  and 1/sigma come from a pass of their own (8 us there), else each head would do it again.
- The output projection stays a kernel of its own: inside, a tile of 64 pixels would hold 64 x 512 float32 sums
  (D = 404), half the registers of a multiprocessor, beside the attention's own; D = 788 would take them all.
  `triton_linear` adds bias and residual on the way out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Pair
from .triton_common import LOG2_E, alignment, dot, dot_precision, round_to, shared_memory
from .triton_linear import linear, row_statistics


@triton.jit
def _pack_kernel(
    p_k, p_v, p_k_packed, p_v_packed,
    stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    HEADS, T, T_PADDED, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """(B, heads, T, D) of any strides -> (B * heads, T_PADDED, WIDTH), zeros where there was nothing."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // HEADS).to(tl.int64), (i_bh % HEADS).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_w = tl.arange(0, BLOCK_W)
    m_in = (o_t < T)[:, None] & (o_w < D)[None, :]
    m_out = (o_t < T_PADDED)[:, None] & (o_w < WIDTH)[None, :]
    o_t, o_w = o_t.to(tl.int64), o_w.to(tl.int64)
    o_out = i_bh.to(tl.int64) * T_PADDED * WIDTH + o_t[:, None] * WIDTH + o_w[None, :]
    # [BLOCK_T, BLOCK_W]
    b_k = tl.load(
        p_k + i_b * stride_kb + i_h * stride_kh + o_t[:, None] * stride_kt + o_w[None, :] * stride_kd,
        mask=m_in,
        other=0.0,
    )
    b_v = tl.load(
        p_v + i_b * stride_vb + i_h * stride_vh + o_t[:, None] * stride_vt + o_w[None, :] * stride_vd,
        mask=m_in,
        other=0.0,
    )
    tl.store(p_k_packed + o_out, b_k, mask=m_out)
    tl.store(p_v_packed + o_out, b_v, mask=m_out)


@triton.jit
def _attend(
    b_q, b_q_tail, p_k, p_v, p_out, stride_on, stride_od, i_m, N, T, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_T: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(b_q kᵀ) v for one tile of pixels; ``p_k``, ``p_v`` and ``p_out`` point at this head's first row."""
    WIDTH: tl.constexpr = BLOCK_D + TAIL
    TAIL_OR_16: tl.constexpr = TAIL if TAIL > 0 else 16
    o_d = tl.arange(0, BLOCK_D)
    o_tail = BLOCK_D + tl.arange(0, TAIL_OR_16)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, TAIL]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_acc_tail = tl.zeros([BLOCK_M, TAIL_OR_16], dtype=tl.float32)
    # [BLOCK_M]
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i_t in range(tl.cdiv(T, BLOCK_T)):
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        o_row = o_t.to(tl.int64)[:, None] * WIDTH
        # [BLOCK_T, BLOCK_D]
        b_k = tl.load(p_k + o_row + o_d[None, :])
        # [BLOCK_M, BLOCK_T]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_T], dtype=tl.float32), PRECISION)
        if TAIL > 0:
            # [BLOCK_T, TAIL]
            b_k_tail = tl.load(p_k + o_row + o_tail[None, :])
            b_s = dot(b_q_tail, tl.trans(b_k_tail), b_s, PRECISION)
        b_s = b_s * scale_log2
        if RAGGED:
            # Added, not selected: multiplication and mask are then one instruction a score.
            b_s += tl.where(o_t < T, 0.0, float("-inf"))[None, :]
        # [BLOCK_M]
        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_shrink = tl.exp2(b_max - b_new_max)
        b_max = b_new_max
        # [BLOCK_M, BLOCK_T]
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_p = round_to(b_p, b_k.dtype)
        # [BLOCK_T, BLOCK_D]
        b_v = tl.load(p_v + o_row + o_d[None, :])
        b_acc = dot(b_p, b_v, b_acc * b_shrink[:, None], PRECISION)
        if TAIL > 0:
            # [BLOCK_T, TAIL]
            b_v_tail = tl.load(p_v + o_row + o_tail[None, :])
            b_acc_tail = dot(b_p, b_v_tail, b_acc_tail * b_shrink[:, None], PRECISION)
    o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    p_row = p_out + o_n.to(tl.int64)[:, None] * stride_on
    b_out = round_to(b_acc / b_sum[:, None], p_out.dtype.element_ty)
    tl.store(p_row + o_d.to(tl.int64)[None, :] * stride_od, b_out, mask=m_n[:, None] & (o_d < D)[None, :])
    if TAIL > 0:
        b_out = round_to(b_acc_tail / b_sum[:, None], p_out.dtype.element_ty)
        tl.store(p_row + o_tail.to(tl.int64)[None, :] * stride_od, b_out, mask=m_n[:, None] & (o_tail < D)[None, :])


@triton.jit
def _attention_block_kernel(
    p_x, p_mean, p_rstd, p_gamma, p_beta, p_w, p_bias, p_k, p_v, p_out,
    stride_xb, stride_xn, stride_xd, stride_w, stride_ob, stride_on, N, T, T_PADDED, HEADS, tiles, scale_log2,
    MODEL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_T: tl.constexpr, RAGGED: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TAIL_OR_16: tl.constexpr = TAIL if TAIL > 0 else 16
    i = tl.program_id(0)
    i_h, i_m = i % HEADS, i // HEADS % tiles
    i_b = i // HEADS // tiles
    i_h64, i_b64 = i_h.to(tl.int64), i_b.to(tl.int64)
    o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_tail = BLOCK_D + tl.arange(0, TAIL_OR_16)
    m_n = o_n < N
    # [BLOCK_M]
    b_mean = tl.load(p_mean + i_b64 * N + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(p_rstd + i_b64 * N + o_n, mask=m_n, other=0.0)
    p_row = p_x + i_b64 * stride_xb + o_n.to(tl.int64)[:, None] * stride_xn * ALIGN_X
    p_w_head = p_w + i_h64 * D * stride_w * ALIGN_W
    # [BLOCK_M, BLOCK_D], [BLOCK_M, TAIL]
    b_q_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_q_acc_tail = tl.zeros([BLOCK_M, TAIL_OR_16], dtype=tl.float32)
    for o_k0 in range(0, MODEL, BLOCK_K):
        o_k = o_k0 + tl.arange(0, BLOCK_K)
        m_k = o_k < MODEL
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_row + o_k.to(tl.int64)[None, :] * stride_xd, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_gamma = tl.load(p_gamma + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_gamma[None, :] + b_beta[None, :]
        b_x = round_to(b_x, p_x.dtype.element_ty)
        # [BLOCK_D, BLOCK_K]
        b_w = tl.load(
            p_w_head + o_d[:, None] * stride_w * ALIGN_W + o_k[None, :],
            mask=(o_d < D)[:, None] & m_k[None, :],
            other=0.0,
        )
        b_q_acc = dot(b_x, tl.trans(b_w), b_q_acc, PRECISION)
        if TAIL > 0:
            # [TAIL, BLOCK_K]
            b_w_tail = tl.load(
                p_w_head + o_tail[:, None] * stride_w * ALIGN_W + o_k[None, :],
                mask=(o_tail < D)[:, None] & m_k[None, :],
                other=0.0,
            )
            b_q_acc_tail = dot(b_x, tl.trans(b_w_tail), b_q_acc_tail, PRECISION)
    b_bias = tl.load(p_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_q = round_to(b_q_acc + b_bias[None, :], p_x.dtype.element_ty)
    b_q_tail = b_q
    if TAIL > 0:
        b_bias = tl.load(p_bias + i_h * D + o_tail, mask=o_tail < D, other=0.0).to(tl.float32)
        b_q_tail = round_to(b_q_acc_tail + b_bias[None, :], p_x.dtype.element_ty)
    o_panel = (i_b64 * HEADS + i_h64) * T_PADDED * (BLOCK_D + TAIL)
    p_out_head = p_out + i_b64 * stride_ob + i_h64 * D
    _attend(
        b_q, b_q_tail, p_k + o_panel, p_v + o_panel, p_out_head, stride_on, 1, i_m, N, T, scale_log2,
        D, BLOCK_M, BLOCK_D, TAIL, BLOCK_T, RAGGED, PRECISION,
    )  # fmt: skip


def _split_width(d: int) -> tuple[int, int]:
    """BLOCK_D and TAIL, powers of two of at least 16 (TAIL may be 0), that cover a head of width d.

    The tail costs products of its own, so it must save a quarter of the columns that a single power of two would have.
    """
    whole = max(16, triton.next_power_of_2(d))
    half = whole // 2
    tail = max(16, triton.next_power_of_2(d - half)) if d > half else 0
    return (half, tail) if half >= 16 and tail <= whole // 4 else (whole, 0)


def _choose_blocks(d: int, dtype: torch.dtype, shared: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages by head width, dtype and the shared memory of the device.

    A table, not a search: the shapes of a call differ from image to image, and timing candidates at run time would cost
    more than a call. Half precision: 128 pixels are two warpgroups of 64 rows, the unit of Hopper's matrix instruction;
    past 160 columns the queries and the sums of 128 pixels no longer fit the registers (ptxas spills 2 KB a thread), 64
    do. Tokens a step and stages follow from the shared memory: the queries, and per stage a tile of K and one of V.
    float32 products run on the ordinary cores unless TF32 is allowed; their operands pass through registers, so tiles
    are small. `tests/ops/test_triton_compiles.py` shows that the published widths do not spill on Hopper.
    """
    block_d, tail = _split_width(d)
    width = block_d + tail
    if dtype == torch.float32:
        sizes = [(64, 32, 2), (32, 32, 2), (32, 16, 2), (16, 16, 2), (16, 16, 1)]
        sizes = sizes if width <= 128 else sizes[2:]
    else:
        sizes = [(128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 16, 1)]
        sizes = sizes if width <= 160 else sizes[2:]
    for block_m, block_t, stages in sizes:
        if (block_m + 2 * stages * block_t) * width * dtype.itemsize <= shared - 16 * 1024:
            break
    return {
        "BLOCK_M": block_m,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "TAIL": tail,
        "num_warps": 4 if block_m * width * dtype.itemsize <= 8192 else 8,
        "num_stages": stages,
    }


def _pack(k: Tensor, v: Tensor, block_t: int, width: int) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, d = k.shape
    padded = triton.cdiv(tokens, block_t) * block_t
    packed = [torch.empty((batch * heads, padded, width), dtype=k.dtype, device=k.device) for _ in range(2)]
    _pack_kernel[(batch * heads, triton.cdiv(padded, 16))](
        k, v, packed[0], packed[1], *k.stride(), *v.stride(), heads, tokens, padded,
        D=d, WIDTH=width, BLOCK_T=16, BLOCK_W=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return packed[0], packed[1]


def attention_block(
    x: Tensor, norm: Pair, query: Pair, k: Tensor, v: Tensor, out: Pair, eps: float, scale: float
) -> Tensor:
    """As :func:`loftup.ops.reference.attention_block`."""
    batch, pixels, model = x.shape
    heads, tokens, d = k.shape[1:]
    if x.numel() == 0:
        return torch.empty((batch, pixels, model), dtype=x.dtype, device=x.device)
    blocks = _choose_blocks(d, x.dtype, shared_memory(x.device))
    k_packed, v_packed = _pack(k, v, blocks["BLOCK_T"], blocks["BLOCK_D"] + blocks["TAIL"])
    mean, rstd = row_statistics(x, eps)
    # Rows of a multiple of 16 elements: the output projection then reads them 16 bytes at a time.
    attended = torch.empty((batch, pixels, -(-heads * d // 16) * 16), dtype=x.dtype, device=x.device)[..., : heads * d]
    q_weight = query[0] if query[0].stride(1) == 1 else query[0].contiguous()
    tiles = triton.cdiv(pixels, blocks["BLOCK_M"])
    align_x, align_w = alignment(x.stride(1)), alignment(q_weight.stride(0))
    _attention_block_kernel[(tiles * heads * batch,)](
        x, mean, rstd, norm[0].contiguous(), norm[1].contiguous(), q_weight, query[1].contiguous(),
        k_packed, v_packed, attended, x.stride(0), x.stride(1) // align_x, x.stride(2), q_weight.stride(0) // align_w,
        attended.stride(0), attended.stride(1), pixels, tokens, k_packed.shape[1], heads, tiles, scale * LOG2_E,
        MODEL=model, D=d, BLOCK_K=16 if x.dtype == torch.float32 else 32, RAGGED=tokens % blocks["BLOCK_T"] != 0,
        ALIGN_X=align_x, ALIGN_W=align_w, PRECISION=dot_precision(x.dtype), **blocks,
    )  # fmt: skip
    return linear(attended, *out, residual=x)
