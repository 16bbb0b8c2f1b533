"""Shared by the Triton kernels: rounding, products, and the facts about settings and device that choose constants."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

LOG2_E = 1.4426950408889634


@triton.jit
def _probe():
    pass


# Under TRITON_INTERPRET=1 the decorator gives another class. Asking for the class follows Triton's own reading of the
# variable, and its moment: what counts is its value when triton was imported.
INTERPRETED = tl.constexpr(not isinstance(_probe, JITFunction))


@triton.jit
def round_to(b_x, DTYPE: tl.constexpr):
    """float32 -> ``DTYPE``, to the nearest, ties to even, as the hardware does."""
    # The interpreter truncates float32 to bfloat16, which doubles the rounding error; here the bits are rounded.
    if INTERPRETED and tl.bfloat16 == DTYPE:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        b_y = (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_y = b_x.to(DTYPE)
    return b_y


@triton.jit
def _widen(b_x):
    """Any float -> float32; the interpreter's own way from bfloat16 takes most of the time of a test."""
    if b_x.dtype == tl.bfloat16:
        b_y = (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        b_y = b_x.to(tl.float32)
    return b_y


@triton.jit
def dot(b_left, b_right, b_acc, PRECISION: tl.constexpr):
    """``b_acc + b_left @ b_right``, accumulated in float32."""
    # The interpreter keeps bfloat16 as its bits in a uint16 and multiplies those; float32 holds both factors exactly.
    if INTERPRETED:
        b_acc = tl.dot(_widen(b_left), _widen(b_right), b_acc, input_precision="ieee")
    else:
        b_acc = tl.dot(b_left, b_right, b_acc, input_precision=PRECISION)
    return b_acc


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: "tf32" only where the PyTorch settings allow it for matmul, else exactly.

    Exactly means three TF32 products on the tensor cores ("tf32x3"), whose error is float32's.
    """
    if dtype != torch.float32:
        return "ieee"
    # Since 2.9 PyTorch has two ways to set this and refuses to read the old one after the new one was used.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"
    return "tf32" if allowed else "tf32x3"


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides every stride, in elements.

    Triton infers from an integer argument only whether 16 divides it. The model's rows are 404, 532 or 788 long, which
    4 divides: passed as ``stride // 4`` with 4 as a constexpr, four elements go in one load instead of one.
    """
    return math.gcd(16, *strides)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
