"""The published network in bands of rows: no full-size intermediates, equal to the untiled result.

Behind the stem every pixel is computed for itself, and the stem sees a halo of 2 pixels. Memory is the output, a few
copies of the guidance and a budget.
"""

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inputs import resize_guidance
from ..networks.loftup import LoftUpNetwork
from .canvas import Canvas, budget, sample, too_small
from .engine import FoldedEngine
from .engine_modules import ModuleEngine
from .workers import enough, run_all, workers

__all__ = ["Bands", "Cut", "cut"]

NARROWEST = 64  # columns of the narrowest strip
POINTS_AT_ONCE = 512


@dataclass(frozen=True)
class Cut:
    """How an image is cut: into strips of columns, each of them read in bands of rows."""

    columns: int
    rows: int


def cut(height: int, width: int, engine: FoldedEngine | ModuleEngine, memory: int | None, device: torch.device) -> Cut:
    """Choose strip and band so that the working memory stays within a budget.

    Strips compute their side halos twice, so the whole width is taken if a few of its rows fit.

    Args:
        height: rows of the output.
        width: columns of the output.
        engine: tells how many rows fit.
        memory: budget in bytes; None means the device's default.
        device: where the work is done.

    Raises:
        ValueError: the budget is below what the smallest band needs.
    """
    limit = budget(memory, device)
    columns = width
    while True:
        rows = engine.rows(min(width, columns + 2 * engine.halo), limit)
        if rows >= min(height, 4) or (rows and columns <= NARROWEST):
            return Cut(columns, min(height, rows))
        if columns <= NARROWEST:
            strip = min(width, columns + 2 * engine.halo)
            needed = bisect.bisect_left(range(2**50), 1, key=lambda bytes: min(1, engine.rows(strip, bytes)))
            raise too_small(memory, limit, f"band of this network, a few rows of {columns} pixels", needed)
        columns = max(NARROWEST, columns // 2)


class Bands:
    """The published network, computed by an engine band by band."""

    def __init__(self, network: LoftUpNetwork, engine: FoldedEngine | ModuleEngine) -> None:
        self.network, self.engine = network, engine

    def upsample(self, features: Tensor, image: Tensor, canvas: Canvas, memory: int | None) -> None:
        """Paint the upsampled features.

        Args:
            features: (B, C, h, w), behind the channel norm.
            image: (B, 3, H, W).
            canvas: for the result; its size is the output's.
            memory: budget in bytes, or None.
        """
        engine, (height, width) = self.engine, canvas.size
        plan, count = self._plan(canvas, memory, image.device)
        for index in range(len(image)):
            with engine.arithmetic():
                scaled, keys_values = self._open(features, image, index, canvas.size)

            def strip(left: int, index: int = index, scaled: Tensor = scaled, keys_values: Any = keys_values) -> None:
                right = min(width, left + plan.columns)
                with engine.arithmetic():
                    stem = engine.stem(scaled, left, right, plan.rows)
                for top in range(0, height, plan.rows):
                    bottom = min(height, top + plan.rows)
                    with engine.arithmetic():
                        write = functools.partial(engine.write, stem.read(bottom - top), keys_values)
                    canvas.paint(index, (top, left, bottom, right), write, engine.arithmetic)

            run_all((functools.partial(strip, left) for left in range(0, width, plan.columns)), count)

    def _plan(self, canvas: Canvas, memory: int | None, device: torch.device) -> tuple[Cut, int]:
        """How the image is cut, and how many strips are computed at once."""
        height, width = canvas.size
        limit = budget(memory, device)
        count = most = workers(device) if canvas.in_threads and self.engine.in_threads else 1
        while enough(count, most):
            columns = -(-width // count)
            rows = self.engine.rows(columns + 2 * self.engine.halo, limit // count)
            if columns >= NARROWEST and rows:
                return Cut(columns, min(height, rows)), count
            count -= 1
        return cut(height, width, self.engine, memory, device), 1

    def at(self, features: Tensor, image: Tensor, size: tuple[int, int], points: Tensor, out: Tensor) -> None:
        """Write features at points (B, N, 2) of the grid of a size into ``out`` (B, N, C), N > 0."""
        with self.engine.arithmetic():
            for index in range(len(image)):
                at = functools.partial(self.engine.at, *self._open(features, image, index, size))
                out[index] = sample(points[index], size, POINTS_AT_ONCE, at)

    def _open(self, features: Tensor, image: Tensor, index: int, size: tuple[int, int]) -> tuple[Tensor, Any]:
        """One image's scaled guidance (3, H, W) and the engine's keys and values."""
        own = slice(index, index + 1)
        scaled = self.network.fourier_feat[0](resize_guidance(image[own], size))[0]
        return scaled, self.engine.keys_values(self.network.tokens(features[own]))
