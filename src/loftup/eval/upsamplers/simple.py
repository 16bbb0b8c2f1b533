"""Upsamplers without parameters: interpolation of the features, and larger inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError
from ..features import extract
from .registry import Upsampler, register

__all__ = ["Interpolation", "LargeInput", "LowResolution", "no_argument"]

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


@dataclass
class LargeInput:
    """The backbone's features of a larger image, interpolated bilinearly: the expensive way to finer features.

    Args:
        backbone: that the features come from.
        factor: how many times larger the image is made, in each direction (bicubically).
    """

    backbone: Backbone
    factor: int = 2

    def __call__(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and the image (B, 3, H, W) in [0, 1] to (B, C, H', W')."""
        enlarged = (self.factor * image.shape[-2], self.factor * image.shape[-1])
        large = F.interpolate(image, enlarged, mode="bicubic", align_corners=False)
        finer = extract(self.backbone, large.clamp(0, 1)).to(features.dtype)
        return F.interpolate(finer, size, mode="bilinear", align_corners=False)


def _register(name: str, build: Callable[[], Upsampler]) -> None:
    @register(name)
    def factory(backbone: Backbone, argument: str) -> Upsampler:
        return no_argument(name, argument, build())


_register("lowres", LowResolution)
for _mode in ("nearest", "bilinear", "bicubic"):
    _register(_mode, partial(Interpolation, _mode))


@register("large_input")
def _large_input(backbone: Backbone, argument: str) -> Upsampler:
    if argument and not (argument.isdecimal() and int(argument) > 1):
        expected = "must be an integer above 1"
        raise LoftUpError(f"the factor of 'large_input' {expected}, got {argument!r}; write large_input:2")
    return LargeInput(backbone, int(argument or 2))


def no_argument(name: str, argument: str, value: T) -> T:
    """Give back the value; LoftUpError if the user wrote an argument behind an upsampler's name."""
    if argument:
        raise LoftUpError(f"the upsampler {name!r} takes no argument, got {name}:{argument}; write {name}")
    return value
