"""The arguments that a LoftUp takes, and the errors about others: got, expected, remedy."""

import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoftUpError, translate
from .weights.catalogue import fitting

__all__ = [
    "Size",
    "capturing",
    "check_inputs",
    "check_options",
    "check_out",
    "check_points",
    "output_size",
    "refuse_names",
    "resize_guidance",
]

Size = int | tuple[int, int] | None
LARGEST = 2**24  # pixels a side, whose coordinates float32 tells apart
FLAT = 1e-4  # a channel's range below which the networks take it as flat


def output_size(size: Size, image: Tensor) -> tuple[int, int]:
    """Resolve ``size`` (None, int or pair) to (H', W'); ValueError unless both are positive integers, also NumPy's."""
    if size is None:
        return image.shape[-2], image.shape[-1]
    pair: Any = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    wrong = f"size must be an int or a pair (height, width) of ints, got {size!r}"
    if len(pair) != 2 or any(isinstance(n, bool) for n in pair):
        raise ValueError(wrong)
    if not all(isinstance(n, (int, torch.SymInt)) for n in pair):
        with translate(TypeError, wrong, ValueError):  # which torch.compile cannot see through
            pair = tuple(map(operator.index, pair))
    if min(pair) < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    if any(isinstance(n, int) and n > LARGEST for n in pair):
        raise ValueError(f"size must be at most {LARGEST} a side, got {size!r}")
    return pair[0], pair[1]


def refuse_names(others: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise TypeError for options of other names than a call has, with the name that was meant."""
    for name in others:
        remedy = f"; it has {', '.join(known)}"
        if name in ("output_size", "out_size", "target_size", "scale_factor", "scale", "resolution", "shape"):
            factor = ", such as size=(2 * H, 2 * W)" if name.startswith("scale") else ""
            remedy = f"; the size of the result is size=(height, width) in pixels{factor}"
        raise TypeError(f"there is no option {name!r}{remedy}")


def resize_guidance(image: Tensor, size: tuple[int, int], oversampling: int = 1) -> Tensor:
    """Bring the image to the output size as the paper does: bilinear, align_corners=False, no antialias, float32.

    Args:
        image: (B, 3, H, W).
        size: (H', W') of the output.
        oversampling: greatest k of a guidance with k x k pixels for one of the output, where the image has as many.

    Returns:
        (B, 3, H', W'), or (B, 3 k^2, H', W') with an output pixel's k x k in its channels, as ``F.pixel_unshuffle``
        puts them.
    """
    factor = 1
    if oversampling > 1:
        factor = max(1, min(oversampling, image.shape[-2] // size[0], image.shape[-1] // size[1]))
    finer = factor * size[0], factor * size[1]
    if tuple(image.shape[-2:]) != finer:
        image = F.interpolate(image.float(), finer, mode="bilinear", align_corners=False)
    return F.pixel_unshuffle(image, factor) if factor > 1 else image


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, in which no value can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_inputs(
    features: Tensor,
    image: Tensor,
    channels: int | None,
    device: torch.device,
    backbone: str = "",
    stacklevel: int = 5,
    values: bool = True,
) -> None:
    """Raise TypeError or ValueError, with got, expected and remedy, unless the two fit each other and the weights.

    An image in half precision is taken with a warning, and so is one whose range is next to nothing.

    Args:
        features: (B, C, h, w).
        image: (B, 3, H, W).
        channels: C that the weights expect; None for any.
        device: of the weights.
        backbone: that the weights belong to, for the message; may be empty.
        stacklevel: of the warning; 5 for the caller of a module, whose call goes through three functions of PyTorch's.
        values: whether to look at the values, for which the processor waits for a GPU; not while a CUDA graph is
            captured.
    """
    for name, tensor, shape in (("features", features, "B, C, h, w"), ("image", image, "B, 3, H, W")):
        if not isinstance(tensor, Tensor):
            remedy = ""
            if name == "image" and isinstance(tensor, str | os.PathLike):
                remedy = "; for a file: backbone.preprocess(path)"
            elif name == "image":
                remedy = "; for a picture (H, W, 3): torch.tensor(numpy.array(image)).permute(2, 0, 1)[None] / 255"
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{remedy}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; convert with {name}.to_dense()")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}; convert with {name}.float()")
        if tensor.ndim != 4:
            remedy = f"; for a single one: {name}[None]" if tensor.ndim == 3 else ""
            if remedy and name == "features":
                remedy += "; for tokens (B, h*w, C): features.mT.reshape(B, C, h, w)"
            elif remedy and tensor.shape[0] != 3 == tensor.shape[2]:
                remedy = "; for a single one with its channels last: image.permute(2, 0, 1)[None]"
            raise ValueError(f"{name} must have 4 dimensions ({shape}), got shape {tuple(tensor.shape)}{remedy}")
    # Weights for any number of channels cannot tell; but an image has 3.
    expected = image.shape[1] if channels is None else channels
    if features.shape[1] == 3 != expected and image.shape[1] == expected:
        raise ValueError(
            f"features and image look swapped: got shapes {tuple(features.shape)} and {tuple(image.shape)}; "
            "call up(features, image)"
        )
    if image.shape[1] != 3:
        remedies = {1: "; for a grey image: image.expand(-1, 3, -1, -1)", 4: "; without alpha: image[:, :3]"}
        remedy = _CHANNELS_LAST.format("image") if image.shape[3] in (3, 4) else remedies.get(image.shape[1], "")
        raise ValueError(f"the image has {image.shape[1]} channels, expected 3 (B, 3, H, W){remedy}")
    if channels is not None and features.shape[1] != channels:
        weights = f"the weights {backbone!r} expect" if backbone else "these weights expect"
        count = features.shape[1]
        remedy = _CHANNELS_LAST.format("features") if features.shape[3] == channels else fitting(count)
        raise ValueError(f"features have {count} channels, {weights} {channels}{remedy}")
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
        if any(map(torch._C._functorch.is_batchedtensor, (features, image))):
            raise LoftUpError("up looks at values, which torch.vmap hides from it; pass the whole batch to up itself")
        if image.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the image is {str(image.dtype).removeprefix('torch.')}, whose rounding shows in the upsampled "
                "features (bfloat16: 1 % of them, 11 % at worst); pass the image as it was read, in float32: features "
                "and weights may stay in half precision",
                stacklevel=stacklevel,
            )
        if values and not capturing(features.device):
            _check_values(features, image, stacklevel + 1)


def _check_values(features: Tensor, image: Tensor, stacklevel: int) -> None:
    seen = image.detach().float()  # as the networks see it
    low, high = seen.amin((-2, -1)), seen.amax((-2, -1))
    flat = (high - low < FLAT).all(1)
    rounding = 64 * torch.finfo(torch.float32).eps * torch.maximum(high.abs(), low.abs())
    faint = flat & (high - low > rounding).any(1)
    # Once to the processor, as a GPU is waited for every time.
    finite, seen_finite, guides = torch.stack(
        [features.isfinite().all(), (low.isfinite() & high.isfinite()).all(), ~faint.any()]
    ).tolist()
    for name, tensor, good in (("features hold", features, finite), ("the image holds", seen, seen_finite)):
        if not good:
            remedy = f"look where they come from, or replace them: torch.nan_to_num({name.split()[-2]})"
            if tensor.dtype == torch.float16:
                remedy = "float16 overflows past 65504: run the backbone in bfloat16 or float32"
            raise ValueError(f"{name} {int((~tensor.isfinite()).sum())} values that are not finite; {remedy}")
    if not guides:
        warnings.warn(
            f"the image's channels range over {float((high - low)[flat].max()):.1g} at most; below {FLAT:g} they "
            "count as flat, so that it guides little. Was it divided by 255 twice? Pass it in [0, 1], 0..255 or "
            "normalised",
            stacklevel=stacklevel,
        )


_CHANNELS_LAST = "; where its channels are last: {0}.permute(0, 3, 1, 2)"


def check_options(head: Any, memory: Any, backend: Any) -> int | None:
    """The memory as an int; TypeError unless the options of a call are of their types."""
    if head is not None and not callable(head):
        raise TypeError(
            f"head must be a function of features, a module or a matrix as a tensor, got {type(head).__name__}"
        )
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {backend!r}")
    if memory is None:
        return None
    text = f"memory must be a whole number of bytes, got {memory!r}; 256 MiB are 256 * 2**20"
    if isinstance(memory, bool):
        raise TypeError(text)
    with translate(TypeError, text, TypeError):
        return operator.index(memory)


def check_out(out: Any, features: Tensor, image: Tensor) -> Tensor | None:
    """The tensor to write the result into, of the memory of ``out``; None for None.

    Raises:
        TypeError: neither a tensor nor a NumPy array, or an array that PyTorch cannot use.
        ValueError: it cannot be written to, overlaps itself, or shares its memory with an argument.
    """
    import numpy as np

    if out is None:
        return None
    target = out
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out is a read-only array; give one that can be written (numpy.memmap: mode='r+')")
        usable = "give a plain one, such as numpy.empty(shape, numpy.float32)"
        with translate((TypeError, ValueError), lambda error: f"out cannot be used: {error}; {usable}", TypeError):
            target = torch.from_numpy(out)
    if not isinstance(target, Tensor):
        raise TypeError(f"out must be a tensor or a NumPy array of the result's shape, got {type(out).__name__}")
    if target.layout != torch.strided or target.is_meta or (target.is_floating_point() and target.itemsize < 2):
        kind = "on meta" if target.is_meta else f"{target.layout}, {target.dtype}"
        raise ValueError(f"out is {kind}; give a dense tensor with memory, of 16 bits or more if it is of floats")
    if target.requires_grad or (target.is_inference() and not torch.is_inference_mode_enabled()):
        raise ValueError("out requires a gradient or was made in inference mode; give out.detach() or out.clone()")
    needed = 1 if target.numel() else 0
    for stride, size in sorted(zip(target.stride(), target.shape, strict=True)):
        if size > 1 and stride < needed:
            raise ValueError(
                f"out has several elements in one place of memory (shape {tuple(target.shape)}, strides "
                f"{target.stride()}), as expanded tensors do; give out.clone()"
            )
        needed += (size - 1) * stride
    for name, tensor in (("features", features), ("image", image)):
        if _range(target)[0] < _range(tensor)[1] and _range(tensor)[0] < _range(target)[1]:
            raise ValueError(f"out shares its memory with {name}, which it would overwrite; give out.clone()")
    return target


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor lies between; none where it is empty."""
    if not tensor.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def check_points(points: Tensor, features: Tensor, height: int, width: int) -> None:
    """Raise ValueError or TypeError unless points are (B, N, 2) inside the grid, beside the features."""
    batch = len(features)
    if not isinstance(points, Tensor):
        raise TypeError(
            f"points must be a tensor (B, N, 2), got {type(points).__name__}; for a list of (x, y): "
            "torch.tensor(points)[None]"
        )
    if points.dtype == torch.bool or points.is_complex():
        raise TypeError(f"points must be real numbers, got {points.dtype}; for a mask: mask.nonzero().flip(-1)[None]")
    if points.requires_grad and torch.is_grad_enabled():
        raise ValueError("points require a gradient, which up.at does not give; pass points.detach()")
    if points.ndim != 3 or points.shape[0] != batch or points.shape[2] != 2:
        remedy = "; for those of a single image: points[None]" if points.ndim == 2 and batch == 1 else ""
        raise ValueError(f"points must be (B, N, 2) with B = {batch}, got {tuple(points.shape)}{remedy}")
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
