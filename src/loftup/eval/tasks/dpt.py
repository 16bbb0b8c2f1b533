"""The head of depth and surface normals: convolutions on a dense feature map."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DptHead"]


class DptHead(nn.Module):
    """A head of 7 convolutions in the manner of DPT's fusion blocks (Ranftl et al. 2021).

    DPT fuses four maps of a transformer, from coarse to fine. Here is one map, at its full resolution already, so what
    is left of that is a projection, two residual units of two convolutions and the output's two. In front, channels are
    standardised by their statistics over the training pictures, as backbones differ in scale by orders of magnitude.

    Args:
        channels: C of the features.
        outputs: channels of the prediction.
        hidden: channels in between.
    """

    def __init__(self, channels: int, outputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm2d(channels, momentum=None, affine=False)
        self.project = nn.Conv2d(channels, hidden, 1)
        self.units = nn.Sequential(_ResidualUnit(hidden), _ResidualUnit(hidden))
        self.mix = nn.Conv2d(hidden, hidden // 2, 3, padding=1)
        self.output = nn.Conv2d(hidden // 2, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, n, m) to (B, outputs, n, m)."""
        x = self.units(self.project(self.standardise(features)))
        prediction: Tensor = self.output(F.relu(self.mix(x)))
        return prediction


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))  # type: ignore[no-any-return]
