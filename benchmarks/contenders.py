"""The contenders: LoftUp on every backend, untiled and the way it is published, ``any``, rivals, and interpolation."""

import copy
import functools
from collections.abc import Callable

import torch
from cases import Case
from published import Bilinear, Published
from torch import Tensor, nn

from loftup import LoftUp
from loftup.inference.bands import Bands
from loftup.inference.canvas import Canvas
from loftup.inference.engine import FoldedEngine
from loftup.inference.engine_cpu import CpuEngine
from loftup.inference.fold import fold
from loftup.train.baselines.foreign import load_foreign

Run = Callable[[Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Name to WEIGHTS@FOLDER of other projects whose code is at hand, see loftup.train.baselines.foreign.
RIVALS: dict[str, str] = {}


class DirectEngine(CpuEngine):
    """The CPU engine with the plain engine's stem: PyTorch's convolutions, in the dtype that it has there."""

    stem = FoldedEngine.stem
    rows = FoldedEngine.rows


ENGINES = {"cpu_direct": DirectEngine, "cpu_winograd": functools.partial(CpuEngine, matrix_unit=False)}


def make_loftup(channels: int, device: str) -> LoftUp:
    """Random weights away from their defaults."""
    torch.manual_seed(0)
    up = LoftUp(channels).eval().requires_grad_(False)
    for module in up.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.2)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.data.normal_(1, 0.2)
            module.bias.data.normal_(0, 0.2)
    return up.to(device)


def make_inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Random features (B, C, h, w) and image (B, 3, H, W)."""
    torch.manual_seed(1)
    features = torch.randn(case.batch, case.channels, case.grid, case.grid)
    return features.to(device), torch.rand(case.batch, 3, case.size, case.size).to(device)


def contender(name: str, up: LoftUp, case: Case) -> Run:
    """A function of features and image that is called once for each measurement.

    Args:
        name: ``bilinear:DTYPE``; ``published:DTYPE``, ``published_sdpa:DTYPE`` or ``published_autocast:DTYPE``;
            ``untiled:DTYPE``, the network on the whole image; ``compiled:DTYPE``, the same by torch.compile (on a CPU
            by its "eager" backend, which needs no C++ compiler and is no faster); ``loftup:BACKEND:DTYPE``, the public
            call, where the backend may also be a name of ENGINES; ``graph:BACKEND:DTYPE``, that
            call as a CUDA graph; ``any:DTYPE``, the packaged weights on features of that dtype; a name of RIVALS.
        up: the weights, in float32; those of "any" too, but for the published ways.
        case: tells of head and points.
    """
    kind, *backend, short = name.split(":")
    dtype = DTYPES[short]
    if kind == "bilinear":
        return Bilinear()
    if kind in RIVALS:
        rival = load_foreign(f"{kind}:{RIVALS[kind]}", case.channels).to(up.device)
        return lambda features, image: rival(features, image, tuple(image.shape[2:]))
    if kind == "any":
        packaged = LoftUp.from_pretrained("any", device=up.device)
        return lambda features, image: packaged(features.to(dtype), image)
    if kind == "published_autocast":
        return _autocast(Published(up).to(up.device), dtype)
    if kind.startswith("published"):
        return Published(up, sdpa=kind == "published_sdpa").to(up.device, dtype)
    ours = copy.deepcopy(up).to(dtype)
    if kind == "untiled":
        return lambda features, image: untiled(ours, features.to(dtype), image)
    if kind == "compiled":
        compiled = torch.compile(ours, backend="inductor" if up.device.type == "cuda" else "eager")
        return lambda features, image: compiled(features.to(dtype), image)  # type: ignore[no-any-return]
    head = nn.Conv2d(case.channels, case.head, 1).to(up.device, dtype) if case.head else None
    if backend[0] in ENGINES:
        return _with_engine(ours, head, ENGINES[backend[0]])

    def run(features: Tensor, image: Tensor) -> Tensor:
        if case.points:
            points = torch.rand(case.batch, case.points, 2, device=image.device) * (image.shape[-1] - 1)
            return ours.at(features.to(dtype), image, points.round(), backend=backend[0])
        return ours(features.to(dtype), image, head=head, backend=backend[0])

    return _captured(run) if kind == "graph" else run


def untiled(up: LoftUp, features: Tensor, image: Tensor) -> Tensor:
    """The network on the whole image, as in training, without gradients."""
    with torch.no_grad():
        network = up.upsampler
        return network(up.channelnorm(features.to(network.dtype)).to(network.dtype), image)


def _captured(run: Run) -> Run:
    """A call as a CUDA graph, captured at the first; on a CPU the call itself."""
    held: list[tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = []

    def replay(features: Tensor, image: Tensor) -> Tensor:
        if not features.is_cuda:
            return run(features, image)
        if not held:
            run(features, image)  # prepares weights and kernels
            inputs, graph = (features.clone(), image.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run(*inputs)
            held.append((graph, *inputs, result))
        graph, first, second, result = held[0]
        first.copy_(features)
        second.copy_(image)
        graph.replay()
        return result

    return replay


def _autocast(published: Published, dtype: torch.dtype) -> Run:
    def run(features: Tensor, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, dtype):
            return published(features, image)

    return run


def _with_engine(up: LoftUp, head: nn.Module | None, engine: Callable[..., CpuEngine]) -> Run:
    bands = Bands(up.upsampler, engine(fold(up.upsampler), up.dtype))

    def run(features: Tensor, image: Tensor) -> Tensor:
        canvas = Canvas(features.to(up.dtype), (image.shape[2], image.shape[3]), head)
        bands.upsample(up.channelnorm(features.to(up.dtype)), image, canvas, None)
        return canvas.finish()

    return run
