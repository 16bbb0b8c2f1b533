"""Inference without full-size intermediates: bands of rows, heads applied on the way, single points.

Behind the stem every pixel is computed for itself, and the stem's two convolutions see 2 pixels around. So the output
is made band by band, equal to the untiled result; memory is the output, a few copies of the guidance and a budget.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inputs import resize_guidance
from ..networks.layers import MinMaxScale, axis_coordinates
from .canvas import Head, apply_head
from .choose import EagerEngine, engine_for, inference_dtype

if TYPE_CHECKING:
    from ..model import LoftUp

__all__ = ["Plan", "features_at", "plan", "upsample"]

HALO = 2
NARROWEST = 64  # columns of the narrowest strip
POINTS_AT_ONCE = 512
DEFAULT_MEMORY = {"cuda": 384 * 2**20}
DEFAULT_MEMORY_ELSEWHERE = 96 * 2**20


@dataclass(frozen=True)
class Plan:
    """How an image is cut: into strips of columns, each of them read in bands of rows."""

    columns: int
    rows: int


def plan(height: int, width: int, engine: EagerEngine, memory: int | None, device: torch.device) -> Plan:
    """Choose strip and band so that the working memory stays within a budget.

    Strips compute their side halos twice, so the whole width is taken if a few of its rows fit.

    Args:
        height: rows of the output.
        width: columns of the output.
        engine: tells how many rows fit.
        memory: budget in bytes; None means 384 MiB on CUDA and 96 MiB elsewhere.
        device: where the work is done.

    Raises:
        ValueError: the budget is below what the smallest band needs.
    """
    budget = DEFAULT_MEMORY.get(device.type, DEFAULT_MEMORY_ELSEWHERE) if memory is None else memory
    columns = width
    while True:
        rows = engine.rows(min(width, columns + 2 * HALO), budget)
        if rows >= min(height, 4) or (rows and columns <= NARROWEST):
            return Plan(columns, min(height, rows))
        if columns <= NARROWEST:
            given = f"memory={memory}" if memory is not None else f"the default of {budget}"
            raise ValueError(
                f"{given} bytes do not hold the smallest band of this network, a few rows of {columns} pixels; "
                "give a larger memory="
            )
        columns = max(NARROWEST, columns // 2)


def upsample(
    up: "LoftUp",
    features: Tensor,
    image: Tensor,
    size: tuple[int, int],
    *,
    head: Head | None = None,
    out: Tensor | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Features (B, C, h, w) and an image (B, 3, H, W) to a dense map of a size; see :meth:`LoftUp.forward`."""
    engine = engine_for(up, inference_dtype(up), backend)
    batch, (height, width) = len(image), size
    cut = plan(height, width, engine, memory, image.device)
    rows, columns = axis_coordinates(height, image.device), axis_coordinates(width, image.device)
    result = out
    if head is None:
        shape = (batch, engine.channels, height, width)
        result = features.new_empty(shape) if result is None else result
        _check_out(result, shape)
    for index in range(batch):
        with _plain_arithmetic(image):
            scaled = MinMaxScale()(resize_guidance(image[index : index + 1], size))[0]
            tokens = engine.keys_values(_tokens(up, engine, features[index : index + 1]))
        for left in range(0, width, cut.columns):
            right = min(width, left + cut.columns)
            low, high = max(0, left - HALO), min(width, right + HALO)
            with _plain_arithmetic(image):
                stem = engine.stem(scaled[:, :, low:high], rows, columns[low:high], cut.rows)
            for top in range(0, height, cut.rows):
                bottom = min(height, top + cut.rows)
                with _plain_arithmetic(image):
                    queries = stem.read(bottom - top)[:, left - low : right - low].reshape(-1, engine.width)
                    if head is None:
                        assert result is not None
                        engine.write(queries, tokens, result[index, :, top:bottom, left:right])
                        continue
                    band = engine.pixels(queries, tokens).view(bottom - top, right - left, -1)
                made = apply_head(head, band.movedim(-1, 0)[None].to(features.dtype))
                if result is None:
                    result = made.new_empty(batch, *made.shape[1:-2], height, width)
                if index == left == top == 0:
                    _check_out(result, (batch, *made.shape[1:-2], height, width))
                result[index, ..., top:bottom, left:right] = made[0]
    if result is None:  # an empty batch
        assert head is not None
        result = apply_head(head, features.new_empty(0, engine.channels, height, width))
    return result


@contextmanager
def _plain_arithmetic(tensor: Tensor) -> Iterator[None]:
    """No gradients, and no autocast: the engine has its dtype already."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _tokens(up: "LoftUp", engine: EagerEngine, features: Tensor) -> Tensor:
    """Channel norm and positions by the module itself, in its dtype: (1, C, h, w) to (h*w, D) in the engine's."""
    normal = up.channelnorm(features.to(up.dtype)).to(up.dtype)
    return up.upsampler.tokens(normal)[0].to(engine.dtype)  # type: ignore[no-any-return]


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the result needs {shape}")


def features_at(
    up: "LoftUp",
    features: Tensor,
    image: Tensor,
    size: tuple[int, int],
    points: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Features at points (B, N, 2) of the grid of a size; see :meth:`LoftUp.at`."""
    engine = engine_for(up, inference_dtype(up), backend)
    batch, (height, width) = len(image), size
    rows, columns = axis_coordinates(height, image.device), axis_coordinates(width, image.device)
    result = features.new_empty(batch, points.shape[1], engine.channels)
    if points.shape[1] == 0:
        return result
    with _plain_arithmetic(image):
        for index in range(batch):
            scaled = MinMaxScale()(resize_guidance(image[index : index + 1], size))[0]
            tokens = engine.keys_values(_tokens(up, engine, features[index : index + 1]))
            cells, shares = _corners(points[index].to(torch.float64), height, width)
            needed, position = cells.unique(return_inverse=True)
            computed = [
                engine.pixels(engine.stem_at(scaled, rows, columns, part), tokens)
                for part in needed.split(POINTS_AT_ONCE)
            ]
            around = torch.cat(computed).to(torch.promote_types(engine.dtype, torch.float32))[position]
            result[index] = (around * shares[..., None].to(around.dtype)).sum(1)
    return result


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The 4 pixels around each point (N, 2), as flat indices (N, 4), and their bilinear weights (N, 4)."""
    limit = points.new_tensor([width - 1, height - 1])
    low = points.floor().minimum(limit)
    high = (low + 1).minimum(limit)
    fraction = points - low
    xs = torch.stack([low[:, 0], high[:, 0]], 1)
    ys = torch.stack([low[:, 1], high[:, 1]], 1)
    across = torch.stack([1 - fraction[:, 0], fraction[:, 0]], 1)
    down = torch.stack([1 - fraction[:, 1], fraction[:, 1]], 1)
    cells = ys.long()[:, :, None] * width + xs.long()[:, None, :]
    return cells.flatten(1), (down[:, :, None] * across[:, None, :]).flatten(1)
