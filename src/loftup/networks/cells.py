"""Cells of a feature map and the pixels that belong to them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CellAxis",
    "Prepared",
    "Settings",
    "cell_of",
    "cut_axis",
    "first_pixel",
    "gather_cells",
    "make_axis",
    "strip_cosines",
    "window_cosines",
]

STRIP = 32  # columns of cells, of which a product takes n (n + 2r) for n (2r + 1) results


@dataclass(frozen=True)
class CellAxis:
    """How the pixels of one axis belong to its cells."""

    pixels: Tensor  # (n, P) int64, the pixels of every cell, filled up by repeating; a cell without any has its nearest
    weights: Tensor  # (n, P) float32, that average them; 0 for what was filled up
    offsets: Tensor  # (n, P) float32, of the pixels' centres from the cell's, in cells
    places: Tensor  # (N,) int64, where each pixel is in the flattened (n, P)


def cell_of(pixel: Any, length: int, cells: int) -> Any:
    """The cell that a pixel's centre lies in, of whole numbers or a tensor of them."""
    return (2 * pixel + 1) * cells // (2 * length)


def first_pixel(cell: Any, length: int, cells: int) -> Any:
    """The first pixel whose centre lies in a cell or a later one, of whole numbers or a tensor of them."""
    return (2 * length * cell + cells - 1) // (2 * cells)


def make_axis(length: int, cells: int, device: torch.device | None = None) -> CellAxis:
    """Assign ``length`` pixels to ``cells`` cells, each to the cell that its centre lies in."""
    pixel = torch.arange(length, device=device)
    cell = cell_of(pixel, length, cells)
    index = torch.arange(cells, device=device)
    first = first_pixel(index, length, cells)
    count = first_pixel(index + 1, length, cells) - first
    most = max(1, (length + cells - 1) // cells)
    slot = torch.arange(most, device=device)
    nearest = ((2 * index + 1) * length // (2 * cells)).clamp(max=length - 1)
    pixels = torch.where(count[:, None] > 0, first[:, None] + slot.minimum(count[:, None] - 1), nearest[:, None])
    weights = (slot < count[:, None].clamp(min=1)).float() / count[:, None].clamp(min=1).float()
    offsets = ((2 * pixels + 1) * cells - (2 * index[:, None] + 1) * length).float() / (2 * length)
    return CellAxis(pixels, weights, offsets, cell * most + pixel - first[cell])


@dataclass(frozen=True)
class Prepared:
    """Keys and values of one batch for attention, per cell; padded by the radius at every side."""

    keys: Tensor  # (B, h + 2r, w + 2r, D + 1 + heads), mean codes, each head's constant; then the cell's own settings
    directions: Tensor  # (B, h + 2r, w + 2r, C), standardised features of length 1
    values: Tensor  # (B, h + 2r, w + 2r, C), the features
    settings: "Settings"  # of every picture, not padded


@dataclass(frozen=True)
class Settings:
    """The heads' settings that follow from a picture's statistics."""

    sharpness: Tensor  # (B, 1 + heads), 1 / (2 width^2) of the bells in cells
    strength: Tensor  # (B, heads), factor on the agreement
    shares: Tensor  # (B, heads), added to what the pixels' codes say of each head's share


def window_cosines(directions: Tensor, radius: int) -> Tensor:
    """As :func:`loftup.ops.reference.likeness`: one after another, without all windows' directions in memory."""
    side = 2 * radius + 1
    h, w = (n - 2 * radius for n in directions.shape[1:3])
    own = directions[:, radius : radius + h, radius : radius + w]
    steps = ((down, right) for down in range(side) for right in range(side))
    return torch.stack([(own * directions[:, i : i + h, j : j + w]).sum(-1) for i, j in steps], -1)


def strip_cosines(directions: Tensor, radius: int) -> Tensor:
    """As :func:`window_cosines`, by matrix products of strips of columns, of which the diagonals are taken.

    Nothing as large as the directions is made on the way: 49 of those, freed one after the other with small results in
    between, can leave 49 holes in the heap.
    """
    batch, h, w = directions.shape[0], *(n - 2 * radius for n in directions.shape[1:3])
    side, out = 2 * radius + 1, directions.new_empty(batch, h, w, 2 * radius + 1, 2 * radius + 1)
    for left in range(0, w, STRIP):
        n = min(STRIP, w - left)
        own = directions[:, radius : radius + h, radius + left : radius + left + n]
        for down in range(side):
            products = own @ directions[:, down : down + h, left : left + n + 2 * radius].mT  # (B, h, n, n + 2r)
            a, b, c, d = products.stride()
            out[:, :, left : left + n, down] = products.as_strided((batch, h, n, side), (a, b, c + d, d))
    return out.flatten(-2)


def cut_axis(axis: CellAxis, first: int, last: int) -> CellAxis:
    """The cells from ``first`` to ``last`` (excluded) alone; pixels keep their numbers."""
    return CellAxis(axis.pixels[first:last], axis.weights[first:last], axis.offsets[first:last], axis.places)


def gather_cells(x: Tensor, rows: CellAxis, columns: CellAxis) -> Tensor:
    """Pixels of (B, E, H, W) by cells: (B, n, m, P, Q, E)."""
    (n, p), (m, q) = rows.pixels.shape, columns.pixels.shape
    x = x.index_select(2, rows.pixels.flatten()).index_select(3, columns.pixels.flatten())
    return x.view(*x.shape[:2], n, p, m, q).permute(0, 2, 4, 3, 5, 1)
