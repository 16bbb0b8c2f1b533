"""The arguments of a backbone: their checks, and pictures as tensors."""

import math
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inputs import output_size
from ..pictures import open_picture, to_rgb
from .vit import Triple

__all__ = ["check_image", "read_picture", "resolve_size", "triple"]


def triple(name: str, values: Sequence[float]) -> Triple:
    """Three numbers of a scaling; ValueError unless they are finite, and positive for "std"."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise ValueError(f"{name} must be three finite numbers{', above 0' if name == 'std' else ''}, got {values!r}")
    return numbers[0], numbers[1], numbers[2]


def check_image(image: Tensor) -> None:
    """Raise TypeError or ValueError unless the image is a float tensor (B, 3, H, W) that is not empty."""
    maker = "backbone.preprocess makes one"
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor (B, 3, H, W), got {type(image).__name__}; {maker}")
    if not image.is_floating_point():
        raise TypeError(f"image must be a normalised float tensor, got {image.dtype}; {maker}")
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
        raise ValueError(f"image must be (B, 3, H, W), got {tuple(image.shape)}{_remedy(image)}")


def _remedy(image: Tensor) -> str:
    remedies = (  # dimensions, the channels' place, their number
        (3, 0, 3, "a single one: image[None]"),
        (3, 2, 3, "channels last: image.permute(2, 0, 1)[None]"),
        (4, 3, 3, "channels last: image.permute(0, 3, 1, 2)"),
        (4, 1, 4, "RGBA: image[:, :3]"),
        (4, 1, 1, "a grey image: image.expand(-1, 3, -1, -1)"),
    )
    fitting = (text for ndim, axis, count, text in remedies if image.ndim == ndim and image.shape[axis] == count)
    return next((f"; for {text}" for text in fitting), "")


def resolve_size(size: Any, image: Tensor) -> tuple[int, int]:
    """As :func:`loftup.inputs.output_size`, but takes numpy's integers too."""

    def plain(number: Any) -> Any:
        return int(number) if isinstance(number, Integral) and not isinstance(number, bool) else number

    return output_size(tuple(map(plain, size)) if isinstance(size, tuple | list) else plain(size), image)


def read_picture(source: Any) -> Tensor:
    """Pixels of a PIL image, a path, a uint8 array (H, W, 3) or a uint8 tensor as uint8 (B, 3, H, W)."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            got = f"{source.dtype} of shape {source.shape}"
            raise ValueError(f"an array to preprocess must be uint8 (H, W, 3) in RGB, got {got}")
        return torch.from_numpy(source.copy()).permute(2, 0, 1)[None]
    if isinstance(source, Tensor):
        subject = "a tensor to preprocess must be"
        if source.dtype != torch.uint8:
            raise TypeError(f"{subject} uint8 in 0..255, got {source.dtype}; for [0, 1]: backbone.normalise(image)")
        if source.ndim not in (3, 4) or source.shape[-3] != 3 or source.numel() == 0:
            raise ValueError(f"{subject} (3, H, W) or (B, 3, H, W), got {tuple(source.shape)}")
        return source if source.ndim == 4 else source[None]
    from PIL import Image

    if isinstance(source, str | os.PathLike):
        picture = open_picture(source)
    elif isinstance(source, Image.Image):
        picture = to_rgb(source)
    else:
        raise TypeError(
            f"a picture must be a PIL image, a path, a uint8 array or a uint8 tensor, got {type(source).__name__}"
        )
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2)
