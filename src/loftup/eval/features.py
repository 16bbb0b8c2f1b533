"""Features of pictures."""

import torch
from torch import Tensor

from ..backbones import Backbone

__all__ = ["extract"]


def extract(backbone: Backbone, image: Tensor) -> Tensor:
    """Features (B, C, h, w) in float32 of images (B, 3, H, W) in [0, 1], without gradients."""
    with torch.no_grad():
        features: Tensor = backbone(backbone.normalise(image))
    return features.float()
