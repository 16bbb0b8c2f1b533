"""Upsamplers without parameters: interpolation of the features."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError
from .registry import Upsampler, register

__all__ = ["Interpolation", "LowResolution", "no_argument"]

T = TypeVar("T")


class Interpolation:
    """``F.interpolate`` of the features; the image is not looked at.

    Args:
        mode: "nearest", "bilinear" or "bicubic".
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) to (B, C, H', W')."""
        if self.mode == "nearest":
            return F.interpolate(features, size, mode="nearest-exact")
        return F.interpolate(features, size, mode=self.mode, align_corners=False)


class LowResolution(Interpolation):
    """No upsampling: every pixel has the vector of its cell.

    Attributes:
        native: True. Tasks that predict from every vector alone may predict on the grid of the features and enlarge
            the predictions bilinearly, which is how the paper's tables treat their low-resolution row.
    """

    native = True

    def __init__(self) -> None:
        super().__init__("nearest")


def _register(name: str, build: Callable[[], Upsampler]) -> None:
    @register(name)
    def factory(backbone: Backbone, argument: str) -> Upsampler:
        return no_argument(name, argument, build())


_register("lowres", LowResolution)
for _mode in ("nearest", "bilinear", "bicubic"):
    _register(_mode, partial(Interpolation, _mode))


def no_argument(name: str, argument: str, value: T) -> T:
    """Give back the value; LoftUpError if the user wrote an argument behind an upsampler's name."""
    if argument:
        raise LoftUpError(f"the upsampler {name!r} takes no argument, got {name}:{argument}; write {name}")
    return value
