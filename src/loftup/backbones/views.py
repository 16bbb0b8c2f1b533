"""Shifted views: a model run on several shifts of a picture, whose grids are put between one another.

A map of stride p says one vector for every p pixels. With n shifts a side, p / n pixels apart, the model says n * n
vectors for every cell, each of what lies around another point: the picture keeps its scale, and the model runs n * n
times. Known as shift-and-stitch: Sermanet et al., *OverFeat*, ICLR 2014; Long et al., *Fully Convolutional Networks
for Semantic Segmentation*, CVPR 2015.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import LoftUpError
from .geometry import Maps

__all__ = ["VIEWS", "check_grid", "check_stride", "cost", "interleave", "offsets", "shifted", "shifts_a_side", "take"]

VIEWS = (1, 4, 9, 16)


def shifts_a_side(views: Any) -> int:
    """The n of n * n views; ValueError for another number of them."""
    if isinstance(views, bool) or not isinstance(views, int) or views not in VIEWS:
        near = f"; for {views} shifts along each side: views={views * views}" if views in (2, 3) else ""
        raise ValueError(f"views must be 1, 4, 9 or 16, as many as shifts along both sides make, got {views!r}{near}")
    return math.isqrt(views)


def offsets(stride: int, count: int) -> list[int]:
    """The shifts of ``count`` views a side in whole pixels, rounded down: -4 and 3 for two of a stride of 14.

    With view i, a pixel p shows what is at p + offsets[i], so that its cell y is centred where cell count * y + i of
    the finer grid is.
    """
    return [(2 * index - count + 1) * stride // (2 * count) for index in range(count)]


def check_stride(strides: Sequence[int], views: int, layer: Any) -> None:
    """Raise LoftUpError unless so many views of maps with these strides make one finer grid each."""
    count = shifts_a_side(views)
    if count == 1:
        return
    if len(set(strides)) > 1:
        raise LoftUpError(
            f"the layers {layer} have strides of {', '.join(map(str, strides))} pixels, and views={views} shifts the "
            "picture by parts of one stride: take layers of one stride, wrap each layer by itself, or leave views out"
        )
    if strides[0] < count:
        fitting = max(views for views in VIEWS if math.isqrt(views) <= strides[0])
        raise LoftUpError(
            f"views={views} needs {count} shifts of whole pixels within a cell, got a stride of {strides[0]} pixels; "
            f"take views={fitting}"
        )


def check_grid(features: Tensor, image: Tensor, stride: int, name: str) -> None:
    """Raise LoftUpError unless cells of the features (B, C, h, w) are ``stride`` pixels of the image both ways."""
    sides = [(image.shape[axis], features.shape[axis]) for axis in (2, 3)]
    if all(cells and round(side / cells) == stride for side, cells in sides):
        return
    grid, size = (" x ".join(map(str, pair)) for pair in (features.shape[2:], image.shape[2:]))
    raise LoftUpError(
        f"{name} gave a grid of {grid} cells for {size} pixels; shifted views expect cells of {stride} pixels both "
        "ways: leave views out"
    )


def shifted(image: Tensor, down: int, right: int, border: int = 0) -> Tensor:
    """Move a window over an image, with reflection outside.

    Args:
        image: (B, C, H, W).
        down: pixels by which the window is moved; below 0: up.
        right: likewise.
        border: pixels by which the window is larger than the image, on both sides together.

    Returns:
        (B, C, H + border, W + border), whose pixel (0, 0) is the image's (down - border // 2, right - border // 2).
    """
    rows, columns = (
        _reflected(side, move - border // 2, side + border, image.device)
        for side, move in zip(image.shape[2:], (down, right), strict=True)
    )
    return image.index_select(2, rows).index_select(3, columns)


def _reflected(side: int, start: int, length: int, device: torch.device) -> Tensor:
    """Indices in [0, side) of positions from ``start`` on, mirrored at the outermost pixels as often as needed."""
    period = max(1, 2 * (side - 1))
    # From 0 on, and no remainder: ONNX has none by a number that follows from the size.
    places = torch.arange(length, device=device) + start + period * max(0, -start)
    places = places - places // period * period
    return torch.minimum(places, period - places) if side > 1 else places


def take(image: Tensor, stride: int, count: int, at_once: int, border: int = 0) -> Iterator[Tensor]:
    """The count * count views of images (B, C, H, W), row by row, ``at_once`` of them behind one another in a batch."""
    moves = offsets(stride, count)
    pairs = [(down, right) for down in moves for right in moves]
    for start in range(0, len(pairs), at_once):
        yield torch.cat([shifted(image, *pair, border) for pair in pairs[start : start + at_once]])


def interleave(runs: Sequence[Maps], batch: int, count: int) -> Maps:
    """Put the maps of all views, in the order of :func:`take`, between one another.

    Args:
        runs: of each batch of views, the map (K * B, C, h, w) of each layer.
        batch: B.
        count: of views a side.

    Returns:
        (B, C, count * h, count * w) of each layer.
    """
    maps = []
    for of_layer in zip(*runs, strict=True):
        views = torch.cat([each.unflatten(0, (-1, batch)) for each in of_layer])
        maps.append(rearrange(views, "(i j) b c h w -> b c (h i) (w j)", i=count))
    return maps


def cost(views: int, at_once: int, stride: Any) -> str:
    """A sentence on what views cost beside an input that is enlarged to as fine a grid."""
    count = shifts_a_side(views)
    how = "one after another" if at_once == 1 else f"{min(at_once, views)} at once"
    return (
        f"{views} shifted views: {views} passes a picture, {how}, {views} times the cost of one; stride of the grid "
        f"{stride} (an input of {count} times the side: {views} times the cells in one pass, attention {views**2} "
        "times as much)"
    )
