"""Inference of the universal upsampler without full-size intermediates: bands of blocks, heads on the way, points.

Every output pixel needs its own guidance code and the keys, directions and values of the cells around it. Codes come
from a convolutional network and are made in tiles with a halo; keys are means of codes, so the codes are read twice:
for the keys of all cells, then for the pixels. In between they are kept if they fit into the budget, and made again if
not. Memory is the result, a copy of the guidance, its codes at half resolution, some six times the features and the
budget.

The arithmetic is that of :meth:`loftup.networks.universal.UniversalNetwork.weights`, laid out for speed: pixels are the
innermost axis, and offsets and fading, which rows and columns have each for themselves, are added as one sum.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inputs import resize_guidance
from ..networks.universal import SHORTEST_MEAN, Settings, UniversalNetwork, make_axis
from .bands import (
    DEFAULT_MEMORY,
    DEFAULT_MEMORY_ELSEWHERE,
    _check_out,
    _corners,
    _plain_arithmetic,
)
from .canvas import Head, apply_head
from .choose import choose, inference_dtype
from .codes import Blocks, channels_last, cut_blocks, encode, rectangles, too_small

if TYPE_CHECKING:
    from ..model import LoftUp

__all__ = ["features_at", "upsample"]

LONGEST, SHORTEST = 32, 4  # sides of a block of pixels
IN_CACHE = 24 * 2**20  # bytes that one step works on, on a CPU


# Attention


@dataclass(frozen=True)
class Grid:
    """What attention needs of the cells of one image: rows of a table, padded by the radius at every side.

    Attributes:
        keys: ((h + 2r) * (w + 2r), D + heads).
        directions: ((h + 2r) * (w + 2r), C).
        values: ((h + 2r) * (w + 2r), E), the features, or a linear head's values for them.
        settings: of the picture.
        width: w + 2r.
        side: of a window, 2r + 1.
    """

    keys: Tensor
    directions: Tensor
    values: Tensor
    settings: Settings
    width: int
    side: int

    def windows(self, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Windows around cells, (n, K, E); ``rows`` and ``columns`` broadcast to the n cells."""
        steps = torch.arange(self.side, device=table.device)
        around = (steps[:, None] * self.width + steps).flatten()
        places = (rows * self.width + columns).flatten()[:, None] + around
        return table.index_select(0, places.flatten()).view(*places.shape, -1)


class Attention:
    """The attention of a network, its small weights prepared."""

    def __init__(self, net: UniversalNetwork) -> None:
        self.net = net
        self.steps = torch.arange(-net.radius, net.radius + 1, device=net.log_width.device, dtype=net.log_width.dtype)

    def bias(self, offsets: Tensor, settings: Settings) -> Tensor:
        """What one axis adds to the scores of one picture: (n, P) offsets to (1 + heads, n, side, P)."""
        steps = self.steps[:, None]
        near = 2 * offsets[:, None] * steps - steps.square()
        return settings.sharpness[0, :, None, None, None] * near + self.net._fade(offsets, self.steps).mT

    def __call__(
        self, queries: Tensor, keys: Tensor, gram: Tensor, down: Tensor, across: Tensor, settings: Settings
    ) -> Tensor:
        """Attention weights of pixels on the cells of their windows.

        Args:
            queries: (n * m, P * Q, D), codes of the pixels of a rectangle of n by m blocks.
            keys: (n * m, K, D + heads), of the blocks' windows.
            gram: (n * m, K, K), products of the windows' directions.
            down: (1 + heads, n, 1, side, 1, P, 1), see :meth:`bias`.
            across: (1 + heads, 1 or n, m, 1, side, 1, Q), likewise.
            settings: of the one picture.

        Returns:
            (n * m, K, P * Q), not negative, with sum 1 over K.
        """
        net, depth = self.net, self.net.depth
        constants = keys[..., queries.shape[-1] :]
        pixels = queries.mT

        def scores(head: int) -> Tensor:
            part = slice(head * depth, (head + 1) * depth)
            shape = (down.shape[1], across.shape[2], down.shape[3], across.shape[4], 1, 1)
            made = (constants[..., head].reshape(shape) + down[head] + across[head]).view(*keys.shape[:2], -1)
            return made.baddbmm_(keys[..., part], pixels[:, part], alpha=2)

        first = scores(0).softmax(1)
        agreement = gram @ first
        agreement *= (agreement * first).sum(1, keepdim=True).clamp_(min=SHORTEST_MEAN).rsqrt_()
        shares = (net.gate.weight @ pixels).add_((net.gate.bias + settings.shares[0])[:, None]).softmax(1)
        total = torch.zeros_like(first)
        for head, strength in enumerate(settings.strength[0].tolist()):
            attention = scores(1 + head).add_(agreement, alpha=strength).softmax(1)
            total.addcmul_(attention, shares[:, head, None])
        return total


# One image


@dataclass(frozen=True)
class Piece:
    """The output of a rectangle of blocks.

    Attributes:
        made: (n, m, E, P, Q).
        down: the n blocks.
        across: the m blocks.
    """

    made: Tensor
    down: Blocks
    across: Blocks

    def write(self, target: Tensor) -> None:
        """Write into (E, rows, columns), the rectangle's pixels alone."""
        top, left = self.down.spans[0][0], self.across.spans[0][0]
        m, wide = self.made.shape[1], self.made.shape[-1]
        even = all(count == wide for _, count in self.across.spans)
        for index, (row, tall) in enumerate(self.down.spans):
            made, rows = self.made[index, :, :, :tall], target[:, row - top : row - top + tall]
            if even:
                rows.unflatten(2, (m, wide)).copy_(made.permute(1, 2, 0, 3))
                continue
            for block, (column, count) in zip(made, self.across.spans, strict=True):
                rows[..., column - left : column - left + count].copy_(block[..., :count])


class Job:
    """One image's codes and grid, ready for attention.

    Args:
        attention: of the network.
        features: (1, C, h, w).
        guidance: (1, 3, H, W) at output size.
        values: (1, E, h, w), what is averaged: the features, or a linear head's values for them.
        budget: bytes.
        keep: whether codes may be kept for :meth:`pieces`.

    Raises:
        ValueError: the budget is too small.
    """

    def __init__(
        self,
        attention: Attention,
        features: Tensor,
        guidance: Tensor,
        values: Tensor,
        budget: int,
        keep: bool = True,
    ) -> None:
        net = attention.net
        dtype = net.log_width.dtype
        self.attention, self.net = attention, net
        self.limit = budget // 2
        if features.device.type == "cpu":
            self.limit = min(self.limit, IN_CACHE)
        height, width = guidance.shape[-2:]
        (h, w), side = features.shape[-2:], 2 * net.radius + 1
        axes = make_axis(height, h, features.device), make_axis(width, w, features.device)
        self.axes = axes
        window, item = side**2, features.new_empty(0, dtype=dtype).element_size()
        depth, channels = (1 + net.heads) * net.depth, features.shape[1]
        longest = LONGEST
        while True:
            down, across = (cut_blocks(axis, longest, dtype) for axis in axes)
            pixels = down.pixels.shape[1] * across.pixels.shape[1]
            tables = window * (channels + values.shape[1] + depth + window)
            self.attended = item * (pixels * ((net.heads + 4) * window + depth + values.shape[1]) + tables)
            self.encoded = item * pixels * (4 * depth + 2 * net.encoder.fine.out_channels)
            if max(self.attended, self.encoded) <= budget // 2:
                break
            if longest <= SHORTEST:
                raise too_small(budget)
            longest //= 2
        self.points_at_once = max(1, self.limit // (item * (tables + pixels)))
        self.codes = encode(net, channels_last(net.scale(guidance).to(dtype)), budget)
        self.down, self.across = down.with_pixels(), across.with_pixels()
        all_own = self.down is down and self.across is across
        stored = item * depth * pixels * len(down) * len(across)
        self.stored: list[Tensor] | None = [] if keep and all_own and stored <= budget // 2 else None
        self.grid = self._grid(down, across, features, values)

    def _grid(self, down: Blocks, across: Blocks, features: Tensor, values: Tensor) -> Grid:
        net, depth = self.net, self.codes.coarse.shape[1]
        h, w = features.shape[-2:]
        mean = self.codes.coarse.new_zeros(h, w, depth)
        square = mean.new_zeros(h, w, 1 + net.heads)
        for tall, wide in rectangles(len(down), len(across), self.limit // self.encoded):
            rows, columns = down.part(tall), across.part(wide)
            x = self.codes.blocks(rows, columns)
            if self.stored is not None:
                self.stored.append(x)
            weights = (rows.weights[:, None, :, None] * columns.weights[:, None, :]).view(len(x), 1, -1)
            where, shape = (rows.cells[:, None], columns.cells), (len(rows), len(columns), -1)
            mean.index_put_(where, (weights @ x).view(shape), accumulate=True)
            squares = (weights @ x.square()).view(len(x), -1, net.depth).sum(-1)
            square.index_put_(where, squares.view(shape), accumulate=True)
        prepared = net.assemble(features, mean[None], square[None])
        r = net.radius
        averaged = prepared.values
        if values is not features:
            averaged = F.pad(values.movedim(1, -1).to(mean.dtype), (0, 0, r, r, r, r))
        keys, directions, averaged = (t.flatten(0, 2) for t in (prepared.keys, prepared.directions, averaged))
        return Grid(keys, directions, averaged, prepared.settings, w + 2 * r, 2 * r + 1)

    def pieces(self) -> Iterator[Piece]:
        """The output, rectangle by rectangle."""
        stored = iter(self.stored or ())
        for tall, wide in rectangles(len(self.down), len(self.across), self.limit // self.encoded):
            down, across = self.down.part(tall), self.across.part(wide)
            x = self.codes.blocks(down, across) if self.stored is None else next(stored)
            x = x.view(len(down), len(across), *x.shape[1:])
            for rows, columns in rectangles(len(down), len(across), self.limit // self.attended):
                yield self._attend(x[rows, columns], down.part(rows), across.part(columns))

    def at(self, y: Tensor, x: Tensor) -> Tensor:
        """The output (n, C) at pixels, rows ``y`` and columns ``x``, (n,) int64."""
        grid, bias = self.grid, self.attention.bias
        (rows, down), (columns, across) = (
            (axis.places[pixels] // axis.pixels.shape[1], axis.offsets.flatten()[axis.places[pixels]])
            for axis, pixels in zip(self.axes, (y, x), strict=True)
        )
        dtype = grid.keys.dtype
        directions = grid.windows(grid.directions, rows, columns)
        weights = self.attention(
            self.codes.at(y, x)[:, None],
            grid.windows(grid.keys, rows, columns),
            directions @ directions.mT,
            bias(down.to(dtype)[:, None], grid.settings)[:, :, None, :, None, :, None],
            bias(across.to(dtype)[:, None], grid.settings)[:, :, None, None, :, None, :],
            grid.settings,
        )
        return (grid.windows(grid.values, rows, columns).mT @ weights)[..., 0]

    def _attend(self, x: Tensor, down: Blocks, across: Blocks) -> Piece:
        grid, bias = self.grid, self.attention.bias
        rows, columns = down.cells[:, None], across.cells
        directions = grid.windows(grid.directions, rows, columns)
        weights = self.attention(
            x.flatten(0, 1),
            grid.windows(grid.keys, rows, columns),
            directions @ directions.mT,
            bias(down.offsets, grid.settings)[:, :, None, :, None, :, None],
            bias(across.offsets, grid.settings)[:, None, :, None, :, None, :],
            grid.settings,
        )
        made = grid.windows(grid.values, rows, columns).mT @ weights
        return Piece(made.view(len(down), len(across), -1, down.pixels.shape[1], across.pixels.shape[1]), down, across)


# Whole results


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
    """Features (B, C, h, w) and an image (B, 3, H, W) to a dense map of a size; see :meth:`loftup.LoftUp.forward`."""
    choose(up, inference_dtype(up), backend)  # refuses what cannot run; there is one path
    budget = _budget(memory, image.device)
    batch, channels, result = len(features), features.shape[1], out
    linear = head is not None and _commutes_with_averages(head)
    if batch == 0:
        empty = features.new_empty(0, channels, *size)
        empty = empty if head is None else apply_head(head, empty)
        _check_out(empty if out is None else out, tuple(empty.shape))
        return empty if out is None else out
    with _plain_arithmetic(image):
        attention = Attention(_wide(up))
    for index in range(batch):
        own = features[index : index + 1]
        # Weights have sum 1, so a linear head of an average is the average of the head's values.
        values = apply_head(head, own).detach() if head is not None and linear else own
        with _plain_arithmetic(image):
            job = Job(attention, own, resize_guidance(image[index : index + 1], size), values, budget)
            pieces = job.pieces()
        while True:
            with _plain_arithmetic(image):
                if (piece := next(pieces, None)) is None:
                    break
                (top, bottom), (left, right) = piece.down.range, piece.across.range
                if head is None or linear:
                    if result is None:
                        result = values.new_empty(batch, values.shape[1], *size)
                    _check_out(result, (batch, values.shape[1], *size))
                    piece.write(result[index, :, top:bottom, left:right])
                    continue
                band = features.new_empty(1, channels, bottom - top, right - left)
                piece.write(band[0])
            made = apply_head(head, band)
            if result is None:
                result = made.new_empty(batch, *made.shape[1:-2], *size)
            _check_out(result, (batch, *made.shape[1:-2], *size))
            result[index, ..., top:bottom, left:right] = made[0]
        del job, pieces  # or they stay until the next image's are ready
    assert result is not None
    return result


def features_at(
    up: "LoftUp",
    features: Tensor,
    image: Tensor,
    size: tuple[int, int],
    points: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Features at points (B, N, 2) of the grid of a size; see :meth:`loftup.LoftUp.at`."""
    choose(up, inference_dtype(up), backend)
    budget = _budget(None, image.device)
    batch, (height, width) = len(features), size
    result = features.new_empty(batch, points.shape[1], features.shape[1])
    if 0 in result.shape:
        return result
    with _plain_arithmetic(image):
        attention = Attention(_wide(up))
        for index in range(batch):
            own = features[index : index + 1]
            job = Job(attention, own, resize_guidance(image[index : index + 1], size), own, budget, keep=False)
            pixels, shares = _corners(points[index].to(torch.float64), height, width)
            shares = shares[..., None].to(job.grid.values.dtype)
            for some in torch.arange(len(pixels), device=pixels.device).split(max(1, job.points_at_once // 4)):
                needed, position = pixels[some].unique(return_inverse=True)
                made = (job.at(needed // width, needed % width)[position] * shares[some]).sum(1)
                result[index, some] = made.to(result.dtype)
            del job
    return result


def _budget(memory: int | None, device: torch.device) -> int:
    return DEFAULT_MEMORY.get(device.type, DEFAULT_MEMORY_ELSEWHERE) if memory is None else memory


def _wide(up: "LoftUp") -> UniversalNetwork:
    """The network in the dtype that inference computes in: itself, or a copy."""
    net, dtype = up.upsampler, inference_dtype(up)
    assert isinstance(net, UniversalNetwork)
    return net if up.dtype == dtype else copy.deepcopy(net).to(dtype)


def _commutes_with_averages(head: Head) -> bool:
    """Whether a head is linear, so that it may be applied to the cells in place of the pixels."""
    if type(head) is nn.Conv2d:
        plain = head.kernel_size == head.stride == (1, 1) and head.groups == 1 and head.padding == (0, 0)
    else:
        plain = type(head) is nn.Linear
    if not plain or not isinstance(head, nn.Module):
        return False
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    hooked = everywhere or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    # Where its parameters' gradients are wanted, the map is kept for them.
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return not hooked and not learns
