"""Guidance codes of the universal upsampler, read in blocks of pixels and made in tiles with a halo."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.cells import CellAxis, first_pixel
from ..networks.universal import UniversalNetwork

__all__ = ["Blocks", "Codes", "channels_last", "cut_blocks", "encode", "least_tile", "rectangles"]

COARSE_TILE = 8  # side of the smallest tile of coarse codes


# Blocks


@dataclass(frozen=True)
class Blocks:
    """One axis cut into blocks, each of pixels of one cell. A cell has several blocks if it has many pixels."""

    cells: Tensor  # (n,) int64, the cell of each block
    spans: list[tuple[int, int]]  # first pixel and number of pixels of each block; the number may be 0
    pixels: Tensor  # (n, P) int64, filled up by repeating
    weights: Tensor  # (n, P), that average a cell's pixels; 0 for what was filled up
    offsets: Tensor  # (n, P), of the pixels' centres from their cell's, in cells

    def __len__(self) -> int:
        return len(self.spans)

    def part(self, span: slice) -> "Blocks":
        """Some blocks that follow each other."""
        return Blocks(self.cells[span], self.spans[span], self.pixels[span], self.weights[span], self.offsets[span])

    def with_pixels(self) -> "Blocks":
        """The blocks that have pixels of their own."""
        filled = [index for index, (_, count) in enumerate(self.spans) if count]
        if len(filled) == len(self):
            return self
        spans = [self.spans[index] for index in filled]
        return Blocks(self.cells[filled], spans, self.pixels[filled], self.weights[filled], self.offsets[filled])

    @property
    def range(self) -> tuple[int, int]:
        """First and last (excluded) of all pixels; also a cell without its own has one, the nearest."""
        last, count = self.spans[-1]
        return self.spans[0][0], last + max(1, count)


def cut_blocks(axis: CellAxis, side: int, dtype: torch.dtype) -> Blocks:
    """Cut an axis into blocks of at most ``side`` pixels."""
    cells, most = axis.pixels.shape
    parts = -(-most // side)
    length = -(-most // parts)
    slots = torch.arange(parts * length, device=axis.pixels.device).clamp(max=most - 1)
    size = len(axis.places)
    spans = []
    for cell in range(cells):  # by numbers, as a GPU would have to be waited for
        first, last = first_pixel(cell, size, cells), first_pixel(cell + 1, size, cells)
        nearest = min((2 * cell + 1) * size // (2 * cells), size - 1)
        for start in range(0, parts * length, length):
            place = min(first + start, last - 1) if last > first else nearest
            spans.append((place, max(0, min(length, last - first - start))))
    weights = axis.weights[:, slots]
    weights[:, most:] = 0
    pixels = axis.pixels[:, slots].view(-1, length)
    return Blocks(
        torch.arange(cells, device=slots.device).repeat_interleave(parts),
        spans,
        pixels,
        weights.view(-1, length).to(dtype),
        axis.offsets[:, slots].view(-1, length).to(dtype),
    )


def rectangles(tall: int, wide: int, most: int, count: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut a table into rectangles of at most ``most`` entries, at least 1: whole rows, or parts of one row.

    Where it can be, their number is a multiple of ``count``, so that as many workers end together.
    """
    rows, columns = max(1, most // wide), min(wide, max(1, most))
    if columns == wide:
        rows = next((n for n in range(min(rows, tall), 0, -1) if -(-tall // n) % count == 0), rows)
    for top in range(0, tall, rows):
        for left in range(0, wide, columns):
            yield slice(top, top + rows), slice(left, left + columns)


# Codes


@dataclass(frozen=True)
class Codes:
    """The guidance codes of one image, full resolution made where it is read."""

    net: UniversalNetwork  # makes them
    image: Tensor  # (1, 3, H, W) scaled
    coarse: Tensor  # (1, D, ceil(H / 2), ceil(W / 2))
    factor: int = 1  # pixels of the image along a side whose codes an output pixel averages

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """The codes of a rectangle of output pixels, (rows, columns, D)."""
        k = self.factor
        codes = self._read(k * top, k * bottom, k * left, k * right)
        return codes if k == 1 else codes.unflatten(1, (-1, k)).unflatten(0, (-1, k)).mean((1, 3))

    def _read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        north, south, west, east = max(0, top - 1), bottom + 1, max(0, left - 1), right + 1
        fine = self.net.encoder.fine_codes(channels_last(self.image[..., north:south, west:east]))
        fine = fine[..., top - north : bottom - north, left - west : right - west]
        # Doubling sees a row or column to either side.
        north, south, west, east = max(0, top // 2 - 1), bottom // 2 + 2, max(0, left // 2 - 1), right // 2 + 2
        coarse = F.interpolate(
            channels_last(self.coarse[..., north:south, west:east]),
            scale_factor=2,
            mode="bilinear",
            align_corners=False,
        )
        north, west = 2 * north, 2 * west
        coarse = coarse[..., top - north : bottom - north, left - west : right - west]
        return (fine + coarse)[0].permute(1, 2, 0)

    def at(self, y: Tensor, x: Tensor) -> Tensor:
        """The codes of output pixels, rows ``y`` and columns ``x``, (n,) int64: (n, D)."""
        k = self.factor
        parts = [self._at(k * y + down, k * x + right) for down in range(k) for right in range(k)]
        return parts[0] if k == 1 else torch.stack(parts).mean(0)

    def _at(self, y: Tensor, x: Tensor) -> Tensor:
        near = torch.arange(-1, 2, device=y.device)

        def patches(source: Tensor, y: Tensor, x: Tensor) -> Tensor:
            """(n, E, 3, 3) of (1, E, H, W)."""
            return source[0][:, (y[:, None] + near)[:, :, None], (x[:, None] + near)[:, None]].movedim(1, 0)

        fine = self.net.encoder.fine_codes(patches(F.pad(self.image, (1, 1, 1, 1)), y + 1, x + 1))[..., 1, 1]
        around = patches(F.pad(self.coarse, (1, 1, 1, 1), mode="replicate"), y // 2 + 1, x // 2 + 1)
        coarse = F.interpolate(around, scale_factor=2, mode="bilinear", align_corners=False)
        pixels = torch.arange(len(y), device=y.device)
        return fine + coarse[pixels, :, 2 + y % 2, 2 + x % 2]

    def blocks(self, down: Blocks, across: Blocks) -> Tensor:
        """The codes of a rectangle of blocks, (n * m, P * Q, D)."""
        (top, bottom), (left, right) = down.range, across.range
        codes = self.read(top, bottom, left, right)
        depth = codes.shape[-1]
        places = (down.pixels - top)[:, None, :, None] * (right - left) + (across.pixels - left)[:, None, :]
        return codes.reshape(-1, depth).index_select(0, places.flatten()).view(places[..., 0, 0].numel(), -1, depth)


def channels_last(x: Tensor) -> Tensor:
    """The layout in which convolutions are fast, and a pixel's code lies in one place."""
    return x.contiguous(memory_format=torch.channels_last)


def _coarse_pixel(net: UniversalNetwork, dtype: torch.dtype) -> int:
    """Bytes of a coarse pixel's work: 4 fine ones, before and after ReLU, a few arrays at a half and a quarter."""
    return dtype.itemsize * (4 * 3 + 8 * net.config.encoder_width + net.config.quarter_width)


def least_tile(net: UniversalNetwork, size: tuple[int, int], dtype: torch.dtype) -> int:
    """The budget in bytes that :func:`encode` needs for an image of a size (H, W)."""
    assert net.encoder.halo is not None
    height, width = (min(-(-n // 2), COARSE_TILE + net.encoder.halo // 2 * 2) for n in size)
    return height * width * _coarse_pixel(net, dtype)


def encode(net: UniversalNetwork, image: Tensor, budget: int, factor: int = 1) -> Codes:
    """Make the coarse codes of a scaled image (1, 3, H, W) in tiles, within a budget of :func:`least_tile` or more.

    ``factor`` pixels along a side belong to one of the output.
    """
    height, width = (-(-n // 2) for n in image.shape[-2:])
    encoder = net.encoder
    assert encoder.halo is not None
    halo = encoder.halo // 2
    pixel = _coarse_pixel(net, image.dtype)
    tall, wide = height, width
    while min(height, tall + 2 * halo) * min(width, wide + 2 * halo) * pixel > budget:
        # Whole rows if not most of the work is then the halo's. Even, as the halo is, so that a tile begins where a
        # pixel at a quarter of the resolution does.
        if tall > 4 * halo or wide <= min(tall, 4 * halo):
            tall = -(-tall // 4) * 2
        else:
            wide = -(-wide // 4) * 2
    coarse = torch.empty(
        (1, (1 + net.heads) * net.depth, height, width),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            north, west = max(0, top - halo), max(0, left - halo)
            south, east = top + tall + halo, left + wide + halo
            codes = encoder.coarse(channels_last(image[..., 2 * north : 2 * south, 2 * west : 2 * east]))
            target = coarse[..., top : top + tall, left : left + wide]
            target.copy_(codes[..., top - north :, left - west :][..., : target.shape[2], : target.shape[3]])
    return Codes(net, image, coarse, factor)
