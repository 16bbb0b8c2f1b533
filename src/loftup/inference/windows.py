"""Inference of the universal upsampler without full-size intermediates: bands of blocks, heads on the way, points.

Every output pixel needs its own guidance code and the keys, directions and values of the cells around it. Codes come
from a convolutional network and are made in tiles with a halo; keys are means of codes, so the codes are read twice:
for the keys of all cells, then for the pixels. In between they are kept if they fit into the budget, and made again if
not. Memory is the result, a copy of the guidance (with oversampling, of the larger image), its codes at half
resolution, some six times the features and the budget.

Attention itself is :meth:`loftup.networks.universal.UniversalNetwork.attend`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..inputs import resize_guidance
from ..networks.cells import Settings, make_axis, strip_cosines
from ..networks.guidance import finer_image
from ..networks.layers import Box
from ..networks.universal import UniversalNetwork
from .canvas import Canvas, budget, plain_arithmetic, sample, too_small
from .codes import Blocks, channels_last, cut_blocks, encode, least_tile, rectangles
from .workers import enough, run_all, scratch, workers

__all__ = ["Windows"]

LONGEST, SHORTEST = 32, 4  # sides of a block of pixels
IN_CACHE = 24 * 2**20  # bytes that one step works on, on a CPU
PRODUCT = 2**20  # elements of the output that are made at once there


@dataclass(frozen=True)
class Grid:
    """Keys and values of the cells of one image: rows of a table, padded by the radius at every side."""

    keys: Tensor  # ((h + 2r) * (w + 2r), D + heads)
    directions: Tensor  # ((h + 2r) * (w + 2r), C)
    values: Tensor  # ((h + 2r) * (w + 2r), E), the features, or a linear head's values for them
    settings: Settings  # of the picture
    width: int  # w + 2r
    side: int  # of a window, 2r + 1

    def windows(self, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Windows around cells, (n, K, E); ``rows`` and ``columns`` broadcast to the n cells."""
        steps = torch.arange(self.side, device=table.device)
        around = (steps[:, None] * self.width + steps).flatten()
        places = (rows * self.width + columns).flatten()[:, None] + around
        return table.index_select(0, places.flatten()).view(*places.shape, -1)


@dataclass(frozen=True)
class Piece:
    """The output of a rectangle of blocks."""

    weights: Tensor  # (n * m, K, P * Q), of the cells of a window
    values: Tensor  # (n * m, K, E), of these cells
    down: Blocks  # the n blocks
    across: Blocks  # the m blocks

    @property
    def box(self) -> Box:
        """Its pixels."""
        (top, bottom), (left, right) = self.down.range, self.across.range
        return top, left, bottom, right

    def write(self, target: Tensor) -> None:
        """Write into (E, rows, columns), the rectangle's pixels alone."""
        blocks, _, pixels = self.weights.shape
        channels = self.values.shape[-1]
        if target.device.type != "cpu" or self.weights.device.type != "cpu":
            self._copy(self.values.mT @ self.weights, target)
            return
        # Some channels at a time, through a small buffer that stays in the cache: the product of all would be written
        # to memory and read again, and its memory be new each time.
        parts = -(-channels * blocks * pixels // PRODUCT)
        step = -(-channels // parts)
        for first in range(0, channels, step):
            values = self.values[..., first : first + step]
            product = scratch((blocks, values.shape[-1], pixels), values.dtype)
            torch.bmm(values.mT, self.weights, out=product)
            self._copy(product, target[first : first + step])

    def _copy(self, product: Tensor, target: Tensor) -> None:
        """(n * m, e, P * Q) into (e, rows, columns)."""
        top, left = self.down.spans[0][0], self.across.spans[0][0]
        m, wide = len(self.across), self.across.pixels.shape[1]
        values = product.view(len(self.down), m, product.shape[1], -1, wide)
        even = all(count == wide for _, count in self.across.spans)
        for index, (row, tall) in enumerate(self.down.spans):
            blocks, rows = values[index, :, :, :tall], target[:, row - top : row - top + tall]
            if even:
                rows.unflatten(2, (m, wide)).copy_(rearrange(blocks, "m e p q -> e p m q"))
                continue
            for block, (column, count) in zip(blocks, self.across.spans, strict=True):
                rows[..., column - left : column - left + count].copy_(block[..., :count])


class Job:
    """One image's codes and grid, ready for attention.

    Args:
        net: the network, in the dtype to compute in.
        features: (1, C, h, w).
        guidance: (1, 3, H, W) at output size, or (1, 3 k^2, H, W), see :func:`loftup.inputs.resize_guidance`.
        values: (1, E, h, w), what is averaged: the features, or a linear head's values for them.
        memory: budget in bytes, or None.
        keep: whether codes may be kept for :meth:`pieces`.
        count: pieces that are computed at once, at most; :attr:`count` is what the budget allows.

    Raises:
        ValueError: the budget is too small.
    """

    def __init__(
        self,
        net: UniversalNetwork,
        features: Tensor,
        guidance: Tensor,
        values: Tensor,
        memory: int | None,
        keep: bool = True,
        count: int = 1,
    ) -> None:
        dtype = net.log_width.dtype
        self.net = net
        self.arithmetic = partial(plain_arithmetic, features.device)
        limit = budget(memory, features.device)
        image, factor = finer_image(guidance)
        height, width = guidance.shape[-2:]
        (h, w), side = features.shape[-2:], 2 * net.radius + 1
        axes = make_axis(height, h, features.device), make_axis(width, w, features.device)
        self.axes = axes
        window, item = side**2, features.new_empty(0, dtype=dtype).element_size()
        depth, channels = (1 + net.heads) * net.depth, features.shape[1]
        tile = least_tile(net, (factor * height, factor * width), dtype)
        longest = LONGEST
        while True:
            down, across = (cut_blocks(axis, longest, dtype) for axis in axes)
            pixels = down.pixels.shape[1] * across.pixels.shape[1]
            tables = window * (channels + values.shape[1] + depth + window)
            self.attention_bytes = item * (pixels * ((net.heads + 4) * window + depth + values.shape[1]) + tables)
            self.code_bytes = item * pixels * factor**2 * (4 * depth + net.config.encoder_width)
            piece = 2 * max(self.attention_bytes, self.code_bytes)
            needed = max(piece, tile)
            if needed <= limit:
                break
            if longest <= SHORTEST:
                raise too_small(memory, limit, "piece of this network's work, a few pixels a side", needed)
            longest //= 2
        fitting = min(count, limit // piece)
        self.count = fitting if enough(fitting, count) else 1
        self.limit = limit // 2 // self.count
        if features.device.type == "cpu":
            self.limit = max(piece // 2, min(self.limit, IN_CACHE))
        self.points_at_once = max(1, self.limit // (item * (tables + pixels)))
        self.codes = encode(net, channels_last(net.scale(image).to(dtype)), limit, factor)
        self.down, self.across = down.with_pixels(), across.with_pixels()
        no_empty = self.down is down and self.across is across
        total = item * depth * pixels * len(down) * len(across)
        self.stored: list[Tensor] | None = [] if keep and no_empty and total <= limit // 2 else None
        self.grid = self._grid(down, across, features, values)

    def _grid(self, down: Blocks, across: Blocks, features: Tensor, values: Tensor) -> Grid:
        net, depth = self.net, self.codes.coarse.shape[1]
        h, w = features.shape[-2:]
        mean = self.codes.coarse.new_zeros(h, w, depth)
        square = mean.new_zeros(h, w, 1 + net.heads)
        areas = list(rectangles(len(down), len(across), self.limit // self.code_bytes, self.count))
        sums = [(mean, mean)] * len(areas)
        if self.stored is not None:
            self.stored = [mean] * len(areas)

        def add(index: int, tall: slice, wide: slice) -> None:
            with self.arithmetic():
                rows, columns = down.part(tall), across.part(wide)
                x = self.codes.blocks(rows, columns)
                if self.stored is not None:
                    self.stored[index] = x
                weights = (rows.weights[:, None, :, None] * columns.weights[:, None, :]).view(len(x), 1, -1)
                sums[index] = weights @ x, (weights @ x.square()).view(len(x), -1, net.depth).sum(-1)

        run_all((partial(add, index, *area) for index, area in enumerate(areas)), self.count)
        for (tall, wide), both in zip(areas, sums, strict=True):  # in order, as a cell may be in two areas
            rows, columns = down.part(tall), across.part(wide)
            where, shape = (rows.cells[:, None], columns.cells), (len(rows), len(columns), -1)
            for target, part in zip((mean, square), both, strict=True):
                target.index_put_(where, part.view(shape), accumulate=True)
        prepared = net.assemble(features, mean[None], square[None], strip_cosines)
        r = net.radius
        table = prepared.values
        if values is not features:
            table = F.pad(values.movedim(1, -1).to(mean.dtype), (0, 0, r, r, r, r))
        keys, directions, table = (t.flatten(0, 2) for t in (prepared.keys, prepared.directions, table))
        return Grid(keys, directions, table, prepared.settings, w + 2 * r, 2 * r + 1)

    def pieces(self, take: Callable[[Piece], None]) -> None:
        """Give the output, rectangle by rectangle, to a function; with a count above 1 from several threads at once."""

        def attend(index: int, tall: slice, wide: slice) -> None:
            with self.arithmetic():
                down, across = self.down.part(tall), self.across.part(wide)
                x = self.codes.blocks(down, across) if self.stored is None else self.stored[index]
                x = x.view(len(down), len(across), *x.shape[1:])
            for rows, columns in rectangles(len(down), len(across), self.limit // self.attention_bytes):
                with self.arithmetic():
                    piece = self._attend(x[rows, columns], down.part(rows), across.part(columns))
                take(piece)

        areas = rectangles(len(self.down), len(self.across), self.limit // self.code_bytes, self.count)
        run_all((partial(attend, index, *area) for index, area in enumerate(areas)), self.count)

    def at(self, y: Tensor, x: Tensor) -> Tensor:
        """The output (n, C) at pixels, rows ``y`` and columns ``x``, (n,) int64."""
        (rows, down), (columns, across) = (
            (axis.places[pixels] // axis.pixels.shape[1], axis.offsets.flatten()[axis.places[pixels]])
            for axis, pixels in zip(self.axes, (y, x), strict=True)
        )
        offsets = down.to(self.grid.keys.dtype)[:, None], across.to(self.grid.keys.dtype)[:, None, None]
        weights, values = self._weigh(self.codes.at(y, x)[:, None], rows, columns, *offsets)
        return (values.mT @ weights)[..., 0]

    def _attend(self, x: Tensor, down: Blocks, across: Blocks) -> Piece:
        rows, columns = down.cells[:, None], across.cells
        return Piece(*self._weigh(x.flatten(0, 1), rows, columns, down.offsets, across.offsets[None]), down, across)

    def _weigh(
        self, codes: Tensor, rows: Tensor, columns: Tensor, down: Tensor, across: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pixels' weights on the windows around their cells, (n * m, K, P * Q), and the windows' values."""
        grid = self.grid
        keys, directions, values = (
            grid.windows(table, rows, columns) for table in (grid.keys, grid.directions, grid.values)
        )
        return self.net.attend(codes, keys, directions, down, across, grid.settings), values


class Windows:
    """The universal network, computed window by window in plain PyTorch on every device.

    Args:
        network: whose :attr:`~loftup.networks.guidance.GuidanceEncoder.halo` is known.
    """

    def __init__(self, network: UniversalNetwork) -> None:
        self.arithmetic = partial(plain_arithmetic, next(network.parameters()).device)
        wide = next(network.parameters()).dtype == network.dtype
        self.network = network if wide else copy.deepcopy(network).to(network.dtype)

    def upsample(self, features: Tensor, image: Tensor, canvas: Canvas, memory: int | None) -> None:
        """Paint the upsampled features.

        Args:
            features: (B, C, h, w).
            image: (B, 3, H, W).
            canvas: for the result; its size is the output's.
            memory: budget in bytes, or None.

        Raises:
            ValueError: the budget is too small.
        """
        values = canvas.values()
        count = workers(image.device) if canvas.in_threads else 1
        for index in range(len(image)):
            single = slice(index, index + 1)
            cells = features[single]
            averaged = cells if values is canvas.features else values[single]
            with self.arithmetic():
                job = Job(
                    self.network,
                    cells,
                    resize_guidance(image[single], canvas.size, self.network.config.oversampling),
                    averaged,
                    memory,
                    count=count,
                )

            def take(piece: Piece, index: int = index) -> None:
                canvas.paint(index, piece.box, piece.write, self.arithmetic)

            job.pieces(take)
            del job  # or it stays until the next image's is ready

    def at(self, features: Tensor, image: Tensor, size: tuple[int, int], points: Tensor, out: Tensor) -> None:
        """Write features at points (B, N, 2) of the grid of a size into ``out`` (B, N, C), N > 0."""
        width = size[1]
        with self.arithmetic():
            for index in range(len(image)):
                single = slice(index, index + 1)
                guidance = resize_guidance(image[single], size, self.network.config.oversampling)
                values = features[single]
                job = Job(self.network, values, guidance, values, None, keep=False)
                at = job.at
                out[index] = sample(points[index], size, job.points_at_once, lambda p, at=at: at(p // width, p % width))  # type: ignore[misc]
                del job, at
