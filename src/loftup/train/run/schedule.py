"""The optimizer, and its learning rate at every step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config import OptimizerConfig

__all__ = ["adamw", "learning_rate"]


def adamw(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW as the config says."""
    first, second = config.betas
    return torch.optim.AdamW(parameters, config.rate, betas=(first, second), weight_decay=config.weight_decay)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1: a warm-up, then constant or half a cosine down to ``final`` of the highest."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.rate
    progress = (step - config.warmup) / max(1, steps - config.warmup - 1)
    return config.rate * (config.final + (1 - config.final) * (1 + math.cos(math.pi * min(1, progress))) / 2)
