"""The choice of how a network is computed in inference, and on which backend: the one place that decides."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import LoftUpError
from ..networks.guidance import GuidanceEncoder
from ..networks.loftup import LoftUpNetwork
from ..networks.universal import UniversalNetwork
from ..ops.cpu import has_bfloat16, has_matrix_unit
from .bands import Bands
from .engine import FoldedEngine
from .engine_cpu import CpuEngine
from .engine_modules import ModuleEngine, fits_bands
from .fold import FoldedNetwork, cached, is_plain, why_not_folded
from .whole import Whole
from .windows import Windows

__all__ = [
    "BACKENDS",
    "Choice",
    "Stream",
    "can_run",
    "choose",
    "compute_dtype",
    "explain",
    "open_stream",
    "why_no_triton_windows",
]


WIDEST = 3  # radius of windows that the Triton kernel holds in registers

Stream = Bands | Windows | Whole  # a network ready for inference


@dataclass(frozen=True)
class Choice:
    """The backend that runs, why not the others, and how; prints as a sentence a line."""

    backend: str
    reasons: dict[str, str | None]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"runs on backend {self.backend!r}"]
        lines += [f"{name}: {reason or 'can run'}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, *self.notes])


def explain(up: Any, backend: str | None = None) -> Choice:
    """Say which backend inference with a LoftUp runs on, why not on the others, and what cannot be folded.

    Args:
        up: a :class:`loftup.LoftUp`, as it is now.
        backend: as for :meth:`loftup.LoftUp.forward`.

    Raises:
        TypeError: no LoftUp.
        ValueError: there is no such backend.
        LoftUpError: ``backend`` cannot run here.

    Examples:
        >>> from loftup import LoftUp
        >>> print(explain(LoftUp(384).double()))
        runs on backend 'torch'
        cpu: it computes in float32 and bfloat16, not float64
        torch: can run
        triton: Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)
    """
    if not hasattr(up, "upsampler"):
        raise TypeError(f"explain takes a LoftUp, got {type(up).__name__}; a backbone has backbone.explain()")
    return choose(up.upsampler, backend)


def choose(network: nn.Module, backend: str | None) -> Choice:
    """The backend asked for, or else "cpu" where it can run and "torch" where not; "triton" only if asked for.

    The Triton kernels run only if named, because their first call compiles for some 15 s.

    Raises:
        ValueError: there is no such backend.
        LoftUpError: the backend asked for cannot run; nothing is put in its place.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}, and the device is that of the weights: "
            "up.to(device)"
        )
    device, dtype, notes = next(network.parameters()).device, compute_dtype(network), []
    reasons: dict[str, str | None]
    if type(network) is LoftUpNetwork:
        width = network.config.width // network.config.heads
        reasons = {name: can_run(name, device, dtype, width) for name in BACKENDS}
        if unfolded := why_not_folded(network):
            notes.append(f"{'module by module' if fits_bands(network) else 'the whole image at once'}: {unfolded}")
            folding = "it takes folded weights alone"
            reasons = {name: reason if name == "torch" else reason or folding for name, reason in reasons.items()}
        if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16():
            notes.append("this processor has no bfloat16 arithmetic: float32 will be faster")
        chosen = backend or ("torch" if reasons["cpu"] else "cpu")
        if chosen == "cpu" and dtype == torch.bfloat16:
            how = "by this processor's matrix unit" if has_matrix_unit() else "in float32 by Winograd's algorithm"
            notes.append(f"convolutions {how}")
    else:
        kind = "the network of 'any'" if type(network) is UniversalNetwork else f"a {type(network).__name__}"
        reasons = {"cpu": _why_no_cpu(device), "torch": None, "triton": f"it has no engine for {kind}"}
        if type(network) is UniversalNetwork:
            reasons["triton"] = why_no_triton_windows(network, device, dtype)
        if not _fits_windows(network):
            notes.append(f"the whole image at once: a part of {kind} was replaced or has forward hooks")
        notes.append("'cpu' and 'torch' are the same plain PyTorch here")
        chosen = backend if backend == "triton" else "torch"
    if backend is not None and (reason := reasons[backend]):
        raise LoftUpError(f"backend={backend!r} cannot run here: {reason}; leave backend out for one that can")
    if reasons["triton"] is None and backend != "triton":
        reasons["triton"] = "can run, only if named: its first call compiles for some 15 s"
    return Choice(chosen, reasons, tuple(notes))


def open_stream(network: nn.Module, backend: str | None, compare: bool = True) -> Stream:
    """A network as it is now, ready for inference on the backend that :func:`choose` gives; raises as that does.

    ``compare`` is for :func:`loftup.inference.fold.cached`.
    """
    name, dtype = choose(network, backend).backend, compute_dtype(network)
    if type(network) is UniversalNetwork and _fits_windows(network):
        return _triton_windows(network) if name == "triton" else Windows(network)
    if type(network) is not LoftUpNetwork or (why_not_folded(network) and not fits_bands(network)):
        return Whole(network)
    if why_not_folded(network):
        return Bands(network, ModuleEngine(network))
    make = functools.partial(BACKENDS[name].build, dtype=dtype)
    return Bands(network, cached(network, (name, dtype), make, compare))


def can_run(backend: str, device: torch.device, dtype: torch.dtype, head_width: int = 1) -> str | None:
    """None if a backend of the published network can run on a device in a dtype, else the reason why not."""
    kinds = BACKENDS[backend].dtypes
    if (reason := BACKENDS[backend].why_not(device)) is not None:
        return reason
    if kinds and dtype not in kinds:
        names = [str(kind).removeprefix("torch.") for kind in (*kinds, dtype)]
        return f"it computes in {', '.join(names[:-2])} and {names[-2]}, not {names[-1]}"
    if backend == "triton" and head_width > 512:
        return f"heads are {head_width} wide, the Triton kernels hold at most 512 in shared memory"
    return None


def _why_no_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the weights are on {device}"


def _why_no_triton(device: torch.device) -> str | None:
    # The order spares the import of triton to those who have no use for it.
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need CUDA tensors, these are on {device}"
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return "Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)"
    try:
        from ..ops.triton_common import INTERPRETED
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            return "triton is not installed"
        raise
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device.type == "cpu":
        late = "TRITON_INTERPRET was set after triton was imported: set it before Python starts"
        return None if INTERPRETED.value else late
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"this GPU has compute capability {major}.{minor}, the Triton kernels need 8.0 (Ampere) or newer"
    return None


def why_no_triton_windows(network: UniversalNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the attention of ``any`` can run in its Triton kernel, else the reason why not."""
    if (reason := can_run("triton", device, dtype)) is not None:
        return reason
    if network.radius > WIDEST:
        return f"a pixel looks {network.radius} cells far, the Triton kernel holds windows of at most {WIDEST}"
    return None if _fits_windows(network) else "its kernel takes the network as it is built alone"


def _triton_windows(network: UniversalNetwork) -> Windows:
    from .windows_triton import TritonWindows

    return TritonWindows(network)


def _triton_engine(weights: FoldedNetwork, dtype: torch.dtype) -> FoldedEngine:
    from .engine_triton import TritonEngine

    return TritonEngine(weights, dtype)


@dataclass(frozen=True)
class Backend:
    """An engine of the published network.

    Attributes:
        build: the engine, from folded weights and the dtype to compute in.
        why_not: None where it can run on a device, else the reason why not.
        dtypes: that it computes in; none means all.
    """

    build: Callable[..., FoldedEngine]
    why_not: Callable[[torch.device], str | None]
    dtypes: tuple[torch.dtype, ...] = ()


BACKENDS = {
    "cpu": Backend(CpuEngine, _why_no_cpu, (torch.float32, torch.bfloat16)),
    "torch": Backend(FoldedEngine, lambda device: None),
    "triton": Backend(_triton_engine, _why_no_triton, (torch.float16, torch.bfloat16, torch.float32)),
}


def compute_dtype(network: nn.Module) -> torch.dtype:
    """In which a network is computed: its own dtype, or autocast's where that is on and the network follows it."""
    own: torch.dtype = network.dtype  # type: ignore[assignment]
    kind = next(network.parameters()).device.type
    follows = isinstance(network, LoftUpNetwork) and own != torch.float64
    return torch.get_autocast_dtype(kind) if follows and torch.is_autocast_enabled(kind) else own


def _fits_windows(network: nn.Module) -> bool:
    """Tell whether the universal network may be computed window by window."""
    if type(network) is not UniversalNetwork or type(network.encoder) is not GuidanceEncoder:
        return False
    return network.encoder.halo is not None and all(map(is_plain, (network, network.encoder, network.scale)))
