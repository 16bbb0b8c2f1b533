"""Engines: how the folded network is computed in inference, one for each kind of device.

An engine turns guidance into queries (``stem``) and queries into features (``pixels``);
:mod:`loftup.inference.bands` decides which rows when.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import LoftUpError
from ..ops import can_run_cpu, can_run_triton
from .engine import EagerEngine
from .engine_cpu import CpuEngine
from .fold import Weights, cached

if TYPE_CHECKING:
    from ..model import LoftUp

__all__ = ["BACKENDS", "CpuEngine", "EagerEngine", "can_run", "choose", "engine_for", "explain", "inference_dtype"]

BACKENDS = ("cpu", "torch", "triton")


def can_run(backend: str, device: torch.device, dtype: torch.dtype, head_width: int | None = None) -> str | None:
    """None if a backend can run on a device in a dtype, else the reason why not.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "torch":
        return None
    check = can_run_cpu if backend == "cpu" else can_run_triton
    return check(torch.empty(0, device=device, dtype=dtype), head_width=head_width)


def choose(up: "LoftUp", dtype: torch.dtype, backend: str | None) -> str:
    """The backend asked for, or else "cpu" where it can run and "torch" where not; "triton" only if asked for.

    The Triton kernels wait to be chosen by themselves until their tests have passed on a GPU.

    Raises:
        LoftUpError: the backend asked for cannot run; nothing is put in its place.
    """
    if backend is not None:
        if reason := _reason(up, backend, dtype):
            raise LoftUpError(f"backend={backend!r} cannot run here: {reason}; leave backend out for one that can")
        return "torch" if up.config.channels is None else backend
    cpu = up.config.channels is not None and can_run("cpu", up.device, dtype) is None
    return "cpu" if cpu else "torch"


def _reason(up: "LoftUp", backend: str, dtype: torch.dtype) -> str | None:
    """:func:`can_run` for a module."""
    if up.config.channels is None and backend == "triton":
        return 'there are no Triton kernels for values="features"'
    if up.config.channels is None and backend == "cpu":
        return None if up.device.type == "cpu" else f"the weights are on {up.device}"
    width = None if up.config.channels is None else up.config.width // up.config.heads
    return can_run(backend, up.device, dtype, width)


def engine_for(up: "LoftUp", dtype: torch.dtype, backend: str | None) -> EagerEngine:
    """The engine for a module's weights, made once and kept until they change."""
    name = choose(up, dtype, backend)

    def make(weights: Weights) -> EagerEngine:
        if name == "triton":
            from .engine_triton import TritonEngine

            return TritonEngine(weights, dtype)
        return (CpuEngine if name == "cpu" else EagerEngine)(weights, dtype)

    return cached(up, (name, dtype), make)


@dataclass(frozen=True)
class Choice:
    """What :func:`explain` found; prints as a sentence a line."""

    backend: str
    reasons: dict[str, str | None]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"runs on backend {self.backend!r}"]
        lines += [f"{name}: {reason or 'can run'}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, *self.notes])


def explain(up: "LoftUp", backend: str | None = None) -> Choice:
    """What inference with a module would run on, and why not on the others.

    >>> from loftup import LoftUp
    >>> print(explain(LoftUp(384).double()))
    runs on backend 'torch'
    cpu: it computes in float32 and bfloat16, not float64
    torch: can run
    triton: Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)
    """
    dtype = inference_dtype(up)
    reasons = {name: _reason(up, name, dtype) for name in BACKENDS}
    notes = []
    if up.config.channels is None:
        notes.append("'cpu' and 'torch' are the same plain PyTorch for values=\"features\"")
    if up.device.type == "cpu" and dtype == torch.bfloat16 and not _has_bfloat16():
        notes.append("this processor has no bfloat16 arithmetic: float32 will be faster")
    if reasons["triton"] is None and backend != "triton":
        reasons["triton"] = "can run, only if named: no GPU has checked its kernels yet"
    return Choice(choose(up, dtype, backend), reasons, tuple(notes))


def inference_dtype(up: "LoftUp") -> torch.dtype:
    """The dtype that inference computes in: the module's, or autocast's where it is on and the module not float64.

    With ``values="features"`` float32 at least, whatever autocast says.
    """
    if up.config.channels is None:
        return torch.promote_types(up.dtype, torch.float32)
    kind = up.device.type
    if up.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return up.dtype
    return torch.get_autocast_dtype(kind)


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
