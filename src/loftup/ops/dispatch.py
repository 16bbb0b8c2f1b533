"""The operations as the rest of loftup calls them: check the arguments, choose a backend, run it.

``backend=None`` takes the first backend that can run, in the order of ``BACKENDS``. A backend that is named runs or is
refused with the reason; it is never replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LoftUpError
from . import arguments
from .cpu import can_run_cpu

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Where to find the tensor whose last axis is the width of a head, among an operation's tensors.
_HEAD_WIDTH_OF = {"cross_attention": 0, "attention_block": 5}


def can_run_triton(*tensors: Tensor, head_width: int | None = None) -> str | None:
    """None if the Triton kernels can take these tensors, else the reason why not.

    Args:
        tensors: all the tensor arguments of one call, on one device.
        head_width: for the two kinds of attention.
    """
    device = tensors[0].device
    # The order spares the import of triton to those who have no use for it.
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need CUDA tensors, these are on {device}"
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return "Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)"
    missing = _why_no_triton()
    if missing is not None:
        return missing
    if device.type == "cpu" and not _interpreting():
        return "TRITON_INTERPRET was set after triton was imported: set it before Python starts"
    if device.type == "cuda":
        unfit = _why_not_this_gpu(device.index)
        if unfit is not None:
            return unfit
    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return (
                f"the Triton kernels take float16, bfloat16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
            )
    if head_width is not None and head_width > 512:
        return f"heads are {head_width} wide, the Triton kernels hold at most 512 in shared memory"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return arguments.NO_GRADIENTS
    return None


def can_run_torch(*tensors: Tensor, head_width: int | None = None) -> str | None:
    """None: plain PyTorch takes every tensor that passes the checks of arguments."""
    return None


@dataclass(frozen=True)
class Backend:
    """A module of this folder that has the five operations, and what it can run.

    Attributes:
        load: imports it, at the first call.
        can_run: takes a call's tensors and ``head_width``; None or the reason why not.
        automatic: the device types on which ``backend=None`` may choose it; None means all.
    """

    load: Callable[[], ModuleType]
    can_run: Callable[..., str | None]
    automatic: tuple[str, ...] | None = None


def _load_cpu() -> ModuleType:
    from . import cpu

    return cpu


def _load_triton() -> ModuleType:
    from . import triton

    return triton


def _load_eager() -> ModuleType:
    from . import eager

    return eager


def _load_reference() -> ModuleType:
    from . import reference

    return reference


# In order of preference. The Triton kernels run only if named: they have been checked in Triton's interpreter alone, on
# no GPU yet; once their `gpu` tests have passed on one, automatic=("cuda",) makes them the choice there.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(_load_triton, can_run_triton, automatic=()),
    "cpu": Backend(_load_cpu, can_run_cpu, automatic=("cpu",)),
    "torch": Backend(_load_eager, can_run_torch),
    "reference": Backend(_load_reference, can_run_torch, automatic=()),
}


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v for many queries and few keys, of any strides and any head width.

    >>> out = cross_attention(q, k, v)  # q (B, heads, N, d); k, v (B, heads, T, d)

    Args:
        q: (B, heads, N, d), float16, bfloat16, float32 or float64; B and N may be 0.
        k: (B, heads, T, d), T > 0.
        v: (B, heads, T, d).
        scale: a factor on the scores; None means d**-0.5.
        backend: "triton", "cpu", "torch" or "reference"; None chooses (see ``explain``).

    Returns:
        (B, heads, N, d) in the dtype of ``q``; the softmax is taken in float32.

    Raises:
        ValueError: shapes or devices do not fit together, or T is 0.
        TypeError: dtypes differ or are no floats.
        LoftUpError: the backend is unknown or cannot run this call.
    """
    arguments.check_cross_attention(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    result: Tensor = _implementation("cross_attention", (q, k, v), backend)(q, k, v, scale)
    return result


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
    *,
    eps: float = 1e-5,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention half of a block, keys and values already projected: x + out_proj(attention(LN(x) Wq + bq, k, v)).

    Source: paper, section 1.6.

    Args:
        x: (B, N, D), the residual stream; rows whose stride 8 divides are read fastest.
        norm_weight: (D,), with ``norm_bias`` (D,) the LayerNorm's.
        norm_bias: (D,).
        q_weight: (heads * d, D), as in ``nn.Linear``.
        q_bias: (heads * d,).
        k: (B, heads, T, d), T > 0.
        v: (B, heads, T, d).
        out_weight: (D, heads * d).
        out_bias: (D,).
        eps: of the LayerNorm.
        scale: a factor on the scores; None means d**-0.5.
        backend: see ``cross_attention``.

    Returns:
        (B, N, D) in the dtype of ``x``, which is left as it was.

    Raises:
        ValueError, TypeError, LoftUpError: see ``cross_attention``.
    """
    tensors = (x, norm_weight, norm_bias, q_weight, q_bias, k, v, out_weight, out_bias)
    arguments.check_attention_block(*tensors)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    result: Tensor = _implementation("attention_block", tensors, backend)(*tensors, eps, scale)
    return result


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Feed-forward half of a block: x + W2 gelu(W1 LN(x) + b1) + b2, the exact GELU (paper, section 1.6).

    Args:
        x: (B, N, D), the residual stream.
        norm_weight: (D,).
        norm_bias: (D,).
        weight_1: (C, D), as in ``nn.Linear``; any hidden width C.
        bias_1: (C,).
        weight_2: (D, C).
        bias_2: (D,).
        eps: of the LayerNorm.
        backend: see ``cross_attention``.

    Returns:
        (B, N, D) in the dtype of ``x``, which is left as it was.

    Raises:
        ValueError, TypeError, LoftUpError: see ``cross_attention``.
    """
    tensors = (x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    arguments.check_feed_forward(*tensors)
    result: Tensor = _implementation("feed_forward", tensors, backend)(*tensors, eps)
    return result


def guidance(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    frequencies: Tensor,
    phases: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
    channels: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Fourier code of a band of the image, then LayerNorm: the stem's input (paper, sections 1.3 and 1.4).

    The result is the memory of a channels-last map:

    >>> code = guidance(image, rows, columns, frequencies, phases, weight, bias, dtype=torch.bfloat16)
    >>> code.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)  # (B, 203, H, W), channels_last

    Args:
        image: (B, 3, H, W), float32, scaled to [-0.5, 0.5]; any strides.
        rows: (H,), float32: this band's slice of the whole axis linspace(-1, 1, height of the image).
        columns: (W,), float32, likewise.
        frequencies: (20,), float32: exp(linspace(-2, 10, 20)).
        phases: (2, 5, 20), float32: under sin and under cos, read flat as (20, 5).
        weight: (203,), with ``bias`` (203,) the LayerNorm's, in any float dtype.
        bias: (203,).
        dtype: of the result; everything before is computed in float32.
        eps: of the LayerNorm.
        channels: at least 203; zeros fill the rest (convolutions on tensor cores like a multiple of 8). None means 203.
        backend: see ``cross_attention``.

    Returns:
        (B, H * W, channels): sin (100, frequency-major), cos (100), the image (3), zeros.

    Raises:
        ValueError, TypeError, LoftUpError: see ``cross_attention``.
    """
    tensors = (image, rows, columns, frequencies, phases, weight, bias)
    channels = 10 * frequencies.shape[0] + 3 if channels is None else channels
    arguments.check_guidance(*tensors, dtype, channels)
    result: Tensor = _implementation("guidance", tensors, backend)(*tensors, eps, dtype, channels)
    return result


def head_norm(
    features: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LayerNorm over the channels of each pixel, written channel-first into a band of the result (paper, section 1.7).

    >>> head_norm(conv(x), weight, bias, out=result[:, :, top:bottom])

    Args:
        features: (B, H * W, C), after the 1x1 convolution.
        weight: (C,).
        bias: (C,).
        out: (B, C, H, W), any strides and any float dtype; overwritten.
        eps: of the LayerNorm.
        backend: see ``cross_attention``.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError, LoftUpError: see ``cross_attention``.
    """
    tensors = (features, weight, bias, out)
    arguments.check_head_norm(*tensors)
    _implementation("head_norm", tensors, backend)(*tensors, eps)
    return out


def explain(operation: str, *tensors: Tensor, backend: str | None = None) -> str:
    """Which backend an operation would run on with these tensors, and for each of the others why not.

    >>> print(explain("cross_attention", q, k, v))
    cross_attention on cpu in float32 runs on 'cpu'
      triton: Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)
      cpu: chosen
      torch: can run
      reference: only if named

    Args:
        operation: "cross_attention", "attention_block", "feed_forward", "guidance" or "head_norm".
        tensors: the operation's tensors, in its order.
        backend: as for the operation.

    Raises:
        LoftUpError: the backend is unknown or cannot run this call.
    """
    chosen = _choose(operation, tensors, backend)
    lines = [f"{operation} on {tensors[0].device} in {str(tensors[0].dtype).removeprefix('torch.')} runs on '{chosen}'"]
    for name, candidate in BACKENDS.items():
        if name == chosen:
            status = "chosen"
        else:
            status = candidate.can_run(*tensors, head_width=_head_width(operation, tensors)) or (
                "can run" if _automatic(candidate, tensors) else "only if named"
            )
        lines.append(f"  {name}: {status}")
    return "\n".join(lines)


def _choose(operation: str, tensors: tuple[Tensor, ...], backend: str | None) -> str:
    width = _head_width(operation, tensors)
    if backend is None:
        for name, candidate in BACKENDS.items():
            if _automatic(candidate, tensors) and candidate.can_run(*tensors, head_width=width) is None:
                return name
        raise AssertionError("plain PyTorch can always run")
    if backend not in BACKENDS:
        raise LoftUpError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))} or None to choose")
    reason = BACKENDS[backend].can_run(*tensors, head_width=width)
    if reason is not None:
        raise LoftUpError(f"{operation} cannot run on backend={backend!r}: {reason}")
    return backend


def _implementation(operation: str, tensors: tuple[Tensor, ...], backend: str | None) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(BACKENDS[_choose(operation, tensors, backend)].load(), operation)
    return function


def _automatic(candidate: Backend, tensors: tuple[Tensor, ...]) -> bool:
    return candidate.automatic is None or tensors[0].device.type in candidate.automatic


def _head_width(operation: str, tensors: tuple[Tensor, ...]) -> int | None:
    return tensors[_HEAD_WIDTH_OF[operation]].shape[-1] if operation in _HEAD_WIDTH_OF else None


# What follows depends on the machine alone: torch.compile takes the answers as constants and traces no questions.


def _constant(function: _Function) -> _Function:
    # What torch.compiler.assume_constant_result does, less its import of torch._dynamo, which loads triton.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _why_no_triton() -> str | None:
    try:
        _load_triton()
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            return "triton is not installed"
        raise
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


@_constant
def _interpreting() -> bool:
    return bool(_load_triton().INTERPRETED)


@_constant
def _why_not_this_gpu(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"this GPU has compute capability {major}.{minor}, the Triton kernels need 8.0 (Ampere) or newer"
    return None
