"""The backbone that comes with the package: a small ViT, for trying things without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .load import Weights, build

__all__ = ["TINY", "build_tiny"]

TINY = "tiny"
FOLDER = Path(__file__).parent.parent / "bundled" / "tiny_backbone"


def build_tiny(weights: Weights, options: dict[str, Any]) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """The model, and mean and std of its images; ``weights`` and ``options`` are those of :func:`load_backbone`.

    Raises:
        LoftUpError: a weights file of the user's does not fit, or timm refuses an option.
    """
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    file = FOLDER / "model.safetensors" if weights is None else weights
    return build(config["timm"], file, {**config["options"], **options}), config["mean"], config["std"]
