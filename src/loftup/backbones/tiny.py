"""The convolutions below the transformer blocks of the backbone in the package."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stages"]


class Stages(nn.Module):
    """Several stages of a convolutional network, of one stride, behind one another: detail beside meaning.

    Args:
        network: of timm, built with ``features_only=True``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w), C the sum of the stages' channels."""
        return torch.cat(self.network(image), 1)
