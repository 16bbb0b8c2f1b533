"""The arguments that a LoftUp takes, and the errors about others: got, expected, remedy."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights.catalogue import fitting

__all__ = ["Size", "check_inputs", "check_points", "output_size", "resize_guidance"]

Size = int | tuple[int, int] | None


def output_size(size: Size, image: Tensor) -> tuple[int, int]:
    """Resolve ``size`` (None, int or pair) to (H', W'); ValueError unless both are positive integers."""
    if size is None:
        return image.shape[-2], image.shape[-1]
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in pair):
        raise ValueError(f"size must be an int or a pair (height, width) of ints, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    return pair[0], pair[1]


def resize_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring the image to the output size as the paper does: bilinear, align_corners=False, no antialias, float32."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image.float(), size, mode="bilinear", align_corners=False)


def check_inputs(
    features: Tensor, image: Tensor, channels: int | None, device: torch.device, backbone: str = "", stacklevel: int = 5
) -> None:
    """Raise TypeError or ValueError, with got, expected and remedy, unless the two fit each other and the weights.

    Args:
        features: (B, C, h, w).
        image: (B, 3, H, W); half precision is taken with a warning.
        channels: C that the weights expect; None for any.
        device: of the weights.
        backbone: that the weights belong to, for the message; may be empty.
        stacklevel: of the warning; 5 for the caller of a module, whose call goes through three functions of PyTorch's.
    """
    for name, tensor, shape in (("features", features, "B, C, h, w"), ("image", image, "B, 3, H, W")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}; convert with {name}.float()")
        if tensor.ndim != 4:
            remedy = f"; for a single one: {name}[None]" if tensor.ndim == 3 else ""
            if remedy and name == "features":
                remedy += "; for tokens (B, h*w, C): features.mT.reshape(B, C, h, w)"
            raise ValueError(f"{name} must have 4 dimensions ({shape}), got shape {tuple(tensor.shape)}{remedy}")
    # Weights for any number of channels cannot tell; but an image has 3.
    expected = image.shape[1] if channels is None else channels
    if features.shape[1] == 3 != expected and image.shape[1] == expected:
        raise ValueError(
            f"features and image look swapped: got shapes {tuple(features.shape)} and {tuple(image.shape)}; "
            "call up(features, image)"
        )
    if image.shape[1] != 3:
        remedy = "; for a grey image: image.expand(-1, 3, -1, -1)" if image.shape[1] == 1 else ""
        raise ValueError(f"the image has {image.shape[1]} channels, expected 3 (B, 3, H, W){remedy}")
    if channels is not None and features.shape[1] != channels:
        weights = f"the weights {backbone!r} expect" if backbone else "these weights expect"
        count = features.shape[1]
        raise ValueError(f"features have {count} channels, {weights} {channels}{fitting(count)}")
    if features.shape[0] != image.shape[0]:
        raise ValueError(
            f"features have batch size {features.shape[0]}, the image {image.shape[0]}; "
            "repeat the smaller one with .expand(B, -1, -1, -1)"
        )
    if 0 in features.shape[1:] or 0 in image.shape[-2:]:
        raise ValueError(f"features {tuple(features.shape)} and image {tuple(image.shape)} must not be empty")
    if features.device != device or image.device != device:
        raise ValueError(
            f"features are on {features.device}, the image on {image.device}, the LoftUp weights on {device}; "
            "move them to one device with .to()"
        )
    if not torch.compiler.is_compiling():
        if image.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the image is {str(image.dtype).removeprefix('torch.')}, whose rounding shows in the upsampled "
                "features (bfloat16: 1 % of them, 11 % at worst); pass the image as it was read, in float32: features "
                "and weights may stay in half precision",
                stacklevel=stacklevel,
            )
        for name, tensor in (("features", features), ("image", image)):
            if not bool(tensor.isfinite().all()):
                half = "; float16 overflows past 65504: run the backbone in bfloat16 or float32"
                remedy = half if tensor.dtype == torch.float16 else ""
                raise ValueError(f"{name} hold {int((~tensor.isfinite()).sum())} values that are not finite{remedy}")


def check_points(points: Tensor, features: Tensor, height: int, width: int) -> None:
    """Raise ValueError or TypeError unless points are (B, N, 2) inside the grid, beside the features."""
    batch = len(features)
    if not isinstance(points, Tensor):
        raise TypeError(f"points must be a tensor (B, N, 2), got {type(points).__name__}")
    if points.ndim != 3 or points.shape[0] != batch or points.shape[2] != 2:
        raise ValueError(f"points must be (B, N, 2) with B = {batch}, got {tuple(points.shape)}")
    if points.device != features.device:
        raise ValueError(f"points are on {points.device}, the features on {features.device}; move them with .to()")
    x, y = points[..., 0], points[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not bool(inside.all()):
        where = tuple(points[~inside][0].tolist())
        raise ValueError(
            f"{int((~inside).sum())} points lie outside the grid, the first at (x, y) = {where}; x must be in "
            f"[0, {width - 1}] and y in [0, {height - 1}] (pixel centres are whole numbers)"
        )
