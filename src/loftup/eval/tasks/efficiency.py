"""Costs of an upsampler: parameters, time and memory, with the backbone and without (paper table 7)."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...backbones import Backbone
from ...train.config.schema import Count, Section, Sides
from ..features import extract
from ..result import Metric, Result
from ..upsamplers.registry import Upsampler

__all__ = ["METRICS", "EfficiencyConfig", "efficiency"]

METRICS = {
    "added_parameters": Metric("added parameters M", 3, higher_is_better=False),
    "seconds": Metric("s/image", 4, higher_is_better=False),
    "seconds_with_backbone": Metric("s/image with backbone", 4, higher_is_better=False),
    "memory": Metric("peak MiB", 0, higher_is_better=False),
}


@dataclass
class EfficiencyConfig(Section):
    """Sizes and rounds of a measurement.

    Args:
        size: [height, width] of the picture, which is random.
        output: [height, width] of the upsampled features.
        rounds: measurements, of upsampler alone and with backbone in turns; medians are reported.
        device: to compute on.

    Raises:
        ValueError: a size is no pair of positive numbers, or there is no round.
    """

    size: Sides = field(default_factory=lambda: [224, 224])
    output: Sides = field(default_factory=lambda: [224, 224])
    rounds: Count = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, pair in (("size", self.size), ("output", self.output)):
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"{name} must be [height, width], got {pair}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def efficiency(backbone: Backbone, upsampler: Upsampler, config: EfficiencyConfig | None = None) -> Result:
    """Measure parameters, time and memory on one random picture.

    Returns:
        The metrics of METRICS: medians over the rounds, one warm-up before. "memory" is what the upsampler takes at
        most beside its inputs and its result, of the allocator on CUDA and of the process on Linux; elsewhere it is
        left out. Every round is in the details.
    """
    config = config or EfficiencyConfig()
    height, width = config.size
    size = (config.output[0], config.output[1])
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(config.device)
    features = extract(backbone, image)
    anew = getattr(upsampler, "anew", False)  # it runs the backbone itself

    @torch.inference_mode()
    def alone() -> Tensor:
        return upsampler(features, image, size)

    @torch.inference_mode()
    def together() -> Tensor:
        return upsampler(features if anew else extract(backbone, image), image, size)

    rounds: dict[str, list[float]] = {"seconds": [], "seconds_with_backbone": []}
    for _ in range(1 + config.rounds):  # the first one warms up
        for name, call in (("seconds", alone), ("seconds_with_backbone", together)):
            rounds[name].append(_seconds(call, config.device))
    rounds = {name: values[1:] for name, values in rounds.items()}
    metrics = {name: [statistics.median(values)] for name, values in rounds.items()}
    count = sum(p.numel() for p in upsampler.parameters()) if isinstance(upsampler, nn.Module) else 0
    metrics["added_parameters"] = [count / 1e6]
    if (memory := _memory(alone, config.device)) is not None:
        metrics["memory"] = [memory / 2**20]
    details = {name: {f"round {i + 1}": value for i, value in enumerate(values)} for name, values in rounds.items()}
    return Result({name: metrics[name] for name in METRICS if name in metrics}, {"rounds": details})


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _memory(call: Callable[[], Tensor], device: str) -> float | None:
    """Bytes that a call takes at most, its result not counted; None where nothing tells."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return float(torch.cuda.max_memory_allocated(device) - before - result.numel() * result.element_size())
    clear = Path("/proc/self/clear_refs")
    if device != "cpu" or not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays in the heap would hide what the call takes
    try:
        clear.write_text("5")  # lets the high-water mark begin anew
    except OSError:
        return None
    resident = _status("VmRSS")
    result = call()
    return max(0.0, _status("VmHWM") - resident - result.numel() * result.element_size())


def _status(name: str) -> float:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(name)).split()[1])
