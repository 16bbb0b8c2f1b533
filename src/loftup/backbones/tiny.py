"""The backbone that comes with the package: a small ViT, for trying things without a network."""

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..weights.catalogue import TINY, TINY_BACKBONE
from .load import WeightsSource, build

__all__ = ["TINY", "build_tiny"]


def build_tiny(weights: WeightsSource, options: dict[str, Any]) -> tuple[nn.Module, tuple[Sequence[float] | None, ...]]:
    """The model, and mean and std of its images; ``weights`` and ``options`` are those of :func:`load_backbone`.

    Raises:
        LoftUpError: a weights file of the user's does not fit, or timm refuses an option.
    """
    config = json.loads((TINY_BACKBONE / "config.json").read_text("utf-8"))
    file = TINY_BACKBONE / "model.safetensors" if weights is None else weights
    return build(config["timm"], file, {**config["options"], **options}), (config["mean"], config["std"])
