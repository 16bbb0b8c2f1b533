"""Attention of ``any`` in Triton: pixels weigh the cells of a window around their own, and average their values.

A program owns some pixels of one cell, which all look at the same window of (2 r + 1)^2 cells:

- scores are [cells, pixels] tiles that stay in registers: both rounds of attention, the mixing of the heads and the
  average happen in one kernel, and of what lies between codes and result nothing reaches memory;
- the agreement of a cell with the first round's average is linear in that round's weights: the cosines of all pairs of
  the window's cells (a [cells, cells] product over the channels) times the weights. So the channels are read twice,
  once for the cosines and once for the values, from the L2 cache, where neighbouring windows overlap;
- channels are the rows of the last product and pixels its columns: neighbouring threads then store neighbouring pixels
  of a (C, H, W) map.

By arithmetic, not measurement: 448x448 pixels, 32x32 cells, 384 channels are some 30 GFLOP with the padding of 49 cells
to 64 and 196 pixels to 256, 0.1 ms of an H200 in TF32, and 154 MB of bfloat16 results, 0.05 ms.

``pool`` makes the means of the cells' codes, ``likeness`` the cosines of a cell to its window: one launch each, where
PyTorch's operations take some 150.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Box, Cells
from .triton_common import dot, dot_precision, round_to

FADED: tl.constexpr = tl.constexpr(1e-6)  # as SHARPEST in the network
SHORTEST: tl.constexpr = tl.constexpr(1e-2)  # as SHORTEST_MEAN


@triton.jit
def _first(cell, length, cells):
    """The first pixel whose centre lies in a cell or a later one."""
    return (2 * length * cell + cells - 1) // (2 * cells)


# Differ from picture to picture, or between the parts of one: code for special numbers would be compiled anew.
COMMON = [
    "top",
    "bottom",
    "left",
    "right",
    "first_row",
    "first_column",
    "columns",
    "HEIGHT",
    "WIDTH",
    "ROWS",
    "COLUMNS",
]


@triton.jit(do_not_specialize=COMMON)
def _pool_kernel(
    p_codes, p_mean, p_square, stride_cy, stride_cx, top, bottom, left, right, first_row, first_column, columns,
    HEIGHT, WIDTH, ROWS, COLUMNS, D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a cell's part of a rectangle of pixels to the mean of its codes and of their squares, (rows, columns, D)."""
    i = first_row + tl.program_id(0) // columns
    j = first_column + tl.program_id(0) % columns
    i, j = i.to(tl.int64), j.to(tl.int64)
    y_0, y_1 = _first(i, HEIGHT, ROWS), _first(i + 1, HEIGHT, ROWS)
    x_0, x_1 = _first(j, WIDTH, COLUMNS), _first(j + 1, WIDTH, COLUMNS)
    # A cell without a pixel has its nearest.
    y_0 = tl.where(y_1 > y_0, y_0, tl.minimum((2 * i + 1) * HEIGHT // (2 * ROWS), HEIGHT - 1))
    y_1 = tl.maximum(y_1, y_0 + 1)
    x_0 = tl.where(x_1 > x_0, x_0, tl.minimum((2 * j + 1) * WIDTH // (2 * COLUMNS), WIDTH - 1))
    x_1 = tl.maximum(x_1, x_0 + 1)
    count = ((y_1 - y_0) * (x_1 - x_0)).to(tl.float32)
    y_0, y_1 = tl.maximum(y_0, top), tl.minimum(y_1, bottom)
    x_0, x_1 = tl.maximum(x_0, left), tl.minimum(x_1, right)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_square = tl.zeros([BLOCK_D], dtype=tl.float32)
    for y in range(y_0, y_1):
        for x in range(x_0, x_1, BLOCK_X):
            o_x = x + tl.arange(0, BLOCK_X)
            # [BLOCK_X, BLOCK_D]
            b_code = tl.load(
                p_codes + (y - top).to(tl.int64) * stride_cy + (o_x - left)[:, None] * stride_cx + o_d[None, :],
                mask=(o_x < x_1)[:, None] & (o_d < D)[None, :],
                other=0.0,
            )
            b_mean += tl.sum(b_code, axis=0)
            b_square += tl.sum(b_code * b_code, axis=0)
    o_out = (i * COLUMNS + j) * D + o_d
    tl.store(p_mean + o_out, tl.load(p_mean + o_out, mask=o_d < D) + b_mean / count, mask=o_d < D)
    tl.store(p_square + o_out, tl.load(p_square + o_out, mask=o_d < D) + b_square / count, mask=o_d < D)


@triton.jit(do_not_specialize=["ROWS", "COLUMNS"])
def _likeness_kernel(
    p_directions, p_out, ROWS, COLUMNS, C, RADIUS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cosines of a cell with those of its window, of padded directions: (rows, columns, K)."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    i, j = (tl.program_id(0) // COLUMNS).to(tl.int64), (tl.program_id(0) % COLUMNS).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < SIDE * SIDE
    o_cell = ((i + o_k // SIDE) * (COLUMNS + 2 * RADIUS) + j + o_k % SIDE) * C
    o_own = ((i + RADIUS) * (COLUMNS + 2 * RADIUS) + j + RADIUS) * C
    b_sum = tl.zeros([BLOCK_K], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_own = tl.load(p_directions + o_own + o_c, mask=o_c < C, other=0.0)
        # [BLOCK_K, BLOCK_C]
        b_window = tl.load(
            p_directions + o_cell[:, None] + o_c[None, :], mask=m_k[:, None] & (o_c < C)[None, :], other=0.0
        )
        b_sum += tl.sum(b_window * b_own[None, :], axis=1)
    tl.store(p_out + (i * COLUMNS + j) * SIDE * SIDE + o_k, b_sum, mask=m_k)


@triton.jit
def _scores(
    p_codes, p_keys, p_constants, p_sharpness, o_pixel, o_cell, o_own, m_p, b_near, b_fade,
    head, HEADS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, CELLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of one head, [BLOCK_K, BLOCK_P]; the first round is head 0."""
    ROUNDS: tl.constexpr = HEADS + 1
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    m_k, m_d = o_k < CELLS, o_d < DEPTH
    # [BLOCK_D, BLOCK_P]
    b_code = tl.load(
        p_codes + o_pixel[None, :] + (head * DEPTH + o_d)[:, None], mask=m_d[:, None] & m_p[None, :], other=0.0
    )
    # [BLOCK_K, BLOCK_D]
    b_key = tl.load(
        p_keys + o_cell[:, None] * (ROUNDS * DEPTH) + (head * DEPTH + o_d)[None, :],
        mask=m_k[:, None] & m_d[None, :],
        other=0.0,
    )
    # Never in TF32 alone: scores of some hundreds would be off by some tenths.
    b_s = dot(b_key, b_code, tl.zeros([BLOCK_K, b_code.shape[1]], dtype=tl.float32), "tf32x3") * 2.0
    b_constant = tl.load(p_constants + o_cell * ROUNDS + head, mask=m_k, other=float("-inf"))
    sharpness = tl.load(p_sharpness + o_own * ROUNDS + head)
    return b_s + b_constant[:, None] + sharpness * b_near + b_fade


@triton.jit
def _softmax(b_s):
    """Over the cells, axis 0."""
    b_e = tl.exp(b_s - tl.max(b_s, axis=0)[None, :])
    return b_e / tl.sum(b_e, axis=0)[None, :]


@triton.jit(do_not_specialize=[*COMMON, "tall", "wide", "tiles"])
def _windows_kernel(
    p_codes, p_shares, p_keys, p_constants, p_sharpness, p_strength, p_directions, p_values, p_out,
    stride_cy, stride_cx, stride_oe, stride_oy, stride_ox,
    top, bottom, left, right, first_row, first_column, columns, tall, wide, tiles, HEIGHT, WIDTH, ROWS, COLUMNS, C, E,
    RADIUS: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    CELLS: tl.constexpr = SIDE * SIDE
    tile, index = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i = (first_row + index // columns).to(tl.int64)
    j = (first_column + index % columns).to(tl.int64)
    y_0, y_1 = tl.maximum(_first(i, HEIGHT, ROWS), top), tl.minimum(_first(i + 1, HEIGHT, ROWS), bottom)
    x_0, x_1 = tl.maximum(_first(j, WIDTH, COLUMNS), left), tl.minimum(_first(j + 1, WIDTH, COLUMNS), right)
    o_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o_y, o_x = y_0 + o_p // wide, x_0 + o_p % wide
    m_p = (o_p < tall * wide) & (o_y < y_1) & (o_x < x_1)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < CELLS
    o_cell = (i + o_k // SIDE) * (COLUMNS + 2 * RADIUS) + j + o_k % SIDE  # in the padded grid
    o_own = i * COLUMNS + j
    o_pixel = (o_y - top) * stride_cy + (o_x - left) * stride_cx

    # What follows from the distance in cells.
    b_down = ((2 * o_y + 1) * ROWS - (2 * i + 1) * HEIGHT).to(tl.float32) / (2 * HEIGHT)
    b_across = ((2 * o_x + 1) * COLUMNS - (2 * j + 1) * WIDTH).to(tl.float32) / (2 * WIDTH)
    b_row, b_column = (o_k // SIDE - RADIUS).to(tl.float32), (o_k % SIDE - RADIUS).to(tl.float32)
    # [BLOCK_K, BLOCK_P]
    b_near = 2.0 * (b_row[:, None] * b_down[None, :] + b_column[:, None] * b_across[None, :])
    b_near -= (b_row * b_row + b_column * b_column)[:, None]
    b_dy = (b_down[None, :] - b_row[:, None]) / (RADIUS + 0.5)
    b_dx = (b_across[None, :] - b_column[:, None]) / (RADIUS + 0.5)
    b_fade = 2.0 * tl.log(tl.maximum(1.0 - b_dy * b_dy, FADED) * tl.maximum(1.0 - b_dx * b_dx, FADED))

    # Cosines between the window's cells, [BLOCK_K, BLOCK_K].
    b_cosines = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        # [BLOCK_K, BLOCK_C]
        b_direction = tl.load(
            p_directions + o_cell[:, None] * C + o_c[None, :], mask=m_k[:, None] & (o_c < C)[None, :], other=0.0
        )
        b_cosines = dot(b_direction, tl.trans(b_direction), b_cosines, PRECISION)

    # The first round, and how well each cell agrees with it.
    b_first = _softmax(_scores(
        p_codes, p_keys, p_constants, p_sharpness, o_pixel, o_cell, o_own, m_p, b_near, b_fade,
        0, HEADS, DEPTH, BLOCK_D, CELLS, BLOCK_K,
    ))  # fmt: skip
    b_agreement = dot(b_cosines, b_first, tl.zeros([BLOCK_K, BLOCK_P], dtype=tl.float32), PRECISION)
    b_length = tl.maximum(tl.sum(b_agreement * b_first, axis=0), SHORTEST)
    b_agreement = b_agreement / tl.sqrt(b_length)[None, :]

    # The second.
    b_total = tl.zeros([BLOCK_K, BLOCK_P], dtype=tl.float32)
    o_shares = ((o_y - top) * (right - left) + o_x - left) * HEADS
    for head in range(HEADS):
        b_s = _scores(
            p_codes, p_keys, p_constants, p_sharpness, o_pixel, o_cell, o_own, m_p, b_near, b_fade,
            head + 1, HEADS, DEPTH, BLOCK_D, CELLS, BLOCK_K,
        )  # fmt: skip
        b_s += tl.load(p_strength + o_own * HEADS + head) * b_agreement
        b_total += tl.load(p_shares + o_shares + head, mask=m_p, other=0.0)[None, :] * _softmax(b_s)

    # The average, [BLOCK_C, BLOCK_P] by [BLOCK_C, BLOCK_P].
    o_out = (o_y - top) * stride_oy + (o_x - left) * stride_ox
    for e in range(0, E, BLOCK_C):
        o_e = e + tl.arange(0, BLOCK_C)
        # [BLOCK_K, BLOCK_C]
        b_value = tl.load(
            p_values + o_cell[:, None] * E + o_e[None, :], mask=m_k[:, None] & (o_e < E)[None, :], other=0.0
        )
        b_out = dot(tl.trans(b_value), b_total, tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32), PRECISION)
        tl.store(
            p_out + o_e.to(tl.int64)[:, None] * stride_oe + o_out[None, :],
            round_to(b_out, p_out.dtype.element_ty),
            mask=(o_e < E)[:, None] & m_p[None, :],
        )


def _cells_of(first: int, last: int, length: int, cells: int) -> tuple[int, int]:
    """The cells, first and last (excluded), that pixels ``first`` to ``last`` (excluded) lie in."""
    return (2 * first + 1) * cells // (2 * length), (2 * last - 1) * cells // (2 * length) + 1


def _block(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def pool(codes: Tensor, box: Box, size: tuple[int, int], mean: Tensor, square: Tensor) -> None:
    """As :func:`loftup.ops.reference.pool`."""
    top, left, bottom, right = box
    rows, columns, depth = mean.shape
    if codes.numel() == 0:
        return
    # Where cells have no pixels, any may have its nearest one in the box.
    (first_row, last_row), (first_column, last_column) = (
        (0, cells) if cells > length else _cells_of(first, last, length, cells)
        for first, last, length, cells in ((top, bottom, size[0], rows), (left, right, size[1], columns))
    )
    codes = codes if codes.stride(2) == 1 else codes.contiguous()
    wide = last_column - first_column
    _pool_kernel[((last_row - first_row) * wide,)](
        codes, mean, square, *codes.stride()[:2], top, bottom, left, right, first_row, first_column, wide,
        *size, rows, columns, D=depth, BLOCK_X=16, BLOCK_D=triton.next_power_of_2(depth), num_warps=2,
    )  # fmt: skip


def likeness(directions: Tensor, radius: int) -> Tensor:
    """As :func:`loftup.ops.reference.likeness`."""
    batch, rows, columns, channels = directions.shape
    rows, columns, side = rows - 2 * radius, columns - 2 * radius, 2 * radius + 1
    out = torch.empty((batch, rows, columns, side**2), dtype=directions.dtype, device=directions.device)
    for each, target in zip(directions.contiguous(), out, strict=True):
        _likeness_kernel[(rows * columns,)](
            each, target, rows, columns, channels, RADIUS=radius, BLOCK_K=_block(side**2), BLOCK_C=64, num_warps=4,
        )  # fmt: skip
    return out


def windows(
    codes: Tensor, shares: Tensor, cells: Cells, box: Box, size: tuple[int, int], out: Tensor, exact: bool = True
) -> None:
    """As :func:`loftup.ops.reference.windows`.

    ``exact``: whether products have float32's error, as PyTorch's settings ask for; else TF32's, enough for results in
    half precision.
    """
    top, left, bottom, right = box
    if out.numel() == 0:
        return
    rows, columns = cells.sharpness.shape[:2]
    radius, channels = (cells.keys.shape[0] - rows) // 2, cells.directions.shape[-1]
    heads = cells.strength.shape[-1]
    depth = cells.keys.shape[-1] // (1 + heads)
    codes = codes if codes.stride(2) == 1 else codes.contiguous()
    first_row, last_row = _cells_of(top, bottom, size[0], rows)
    first_column, last_column = _cells_of(left, right, size[1], columns)
    # The most pixels of a cell.
    tall, wide = (
        min(-(-length // n), stop - start)
        for length, n, start, stop in ((size[0], rows, top, bottom), (size[1], columns, left, right))
    )
    # More pixels a program would spill registers (ptxas for Hopper): tests/ops/test_triton_compiles.py.
    block_p, warps = (32, 4) if exact else (64, 8)
    block_p = min(block_p, _block(tall * wide))
    tiles = triton.cdiv(tall * wide, block_p)
    count = (last_row - first_row) * (last_column - first_column)
    _windows_kernel[(tiles * count,)](
        codes, shares.contiguous(), *(table.contiguous() for table in cells), out,
        *codes.stride()[:2], *out.stride(), top, bottom, left, right, first_row, first_column,
        last_column - first_column, tall, wide, tiles, *size, rows, columns, channels, out.shape[0],
        RADIUS=radius, HEADS=heads, DEPTH=depth, BLOCK_D=_block(depth), BLOCK_K=_block((2 * radius + 1) ** 2),
        BLOCK_P=block_p, BLOCK_C=32, PRECISION=dot_precision(torch.float32) if exact else "tf32", num_warps=warps,
    )  # fmt: skip
