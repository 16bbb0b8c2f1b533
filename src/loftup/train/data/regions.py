"""A picture and its class-agnostic masks, cut out of any region at any size without being decoded at full size."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...errors import LoftUpError

__all__ = ["LabelMap", "Masks", "Picture", "Region", "RleMasks", "UnreadableError", "centres", "run_lengths"]

Region = tuple[float, float, float, float]  # top, left, bottom, right
Positions = NDArray[np.int64]


class UnreadableError(LoftUpError):
    """A file that a source cannot read; the text names the file and says why."""


class Masks(Protocol):
    """The masks of one picture; they may overlap, and their order is kept."""

    def __len__(self) -> int:
        """Count the masks."""

    def crop(self, box: Region, size: tuple[int, int], keep: Sequence[int] | None = None) -> Tensor:
        """Cut a region out of the masks and resample it.

        Args:
            box: (top, left, bottom, right) in pixels of the picture and fractions of them, from its top left corner.
            size: (h, w) of the result; each of its pixels takes the value at its centre (``nearest-exact``).
            keep: indices of the masks to consider, in the order in which they are wanted; None means all.

        Returns:
            (M, h, w) bool; masks without a pixel in the result are left out, so that M may be 0.

        Raises:
            ValueError: the box is empty or leaves the picture, or the size is not positive.
            IndexError: ``keep`` names a mask that is not there.
        """


@dataclass(frozen=True)
class Picture:
    """A picture with its masks."""

    name: str  # unique within its source, for messages and caches
    image: Tensor  # (3, H, W) uint8 RGB, upright
    masks: Masks  # of the same height and width
    source: int = 0  # number of its source, of several


class LabelMap:
    """An integer map in which every label is one mask; masks are sorted by label.

    Args:
        labels: (H, W), any integer dtype.
        void: label that is no mask; None where every label is one.

    Raises:
        ValueError: the map is not two-dimensional or empty.
        TypeError: it holds no integers.
    """

    def __init__(self, labels: ArrayLike, void: int | None = None) -> None:
        self.labels = np.asarray(labels)
        if self.labels.ndim != 2 or self.labels.size == 0:
            raise ValueError(f"a label map must be (H, W) and not empty, got {self.labels.shape}")
        if self.labels.dtype.kind not in "iu":
            raise TypeError(f"a label map must hold integers, got {self.labels.dtype}")
        self.void = void
        self._values = np.unique(self.labels)
        if void is not None:
            self._values = self._values[self._values != void]

    def __len__(self) -> int:
        return len(self._values)

    def crop(self, box: Region, size: tuple[int, int], keep: Sequence[int] | None = None) -> Tensor:
        """See :meth:`Masks.crop`."""
        height, width = self.labels.shape
        rows, columns = centres(box, size, height, width)
        small = self.labels[np.ix_(rows, columns)]
        values = self._values[_indices(keep, len(self))]
        values = values[np.isin(values, small)]
        return torch.from_numpy(small[None] == values[:, None, None])

    def classes(self, box: Region, size: tuple[int, int], count: int) -> Tensor:
        """As :meth:`crop`, the labels themselves: (h, w) int64, -1 for the void and what is not below ``count``."""
        rows, columns = centres(box, size, *self.labels.shape)
        small = torch.from_numpy(self.labels[np.ix_(rows, columns)].astype(np.int64))
        known = (small >= 0) & (small < count) & (small != (-1 if self.void is None else self.void))
        return small.where(known, torch.full_like(small, -1))


class RleMasks:
    """Masks as COCO run-length codes, sampled from their runs: no mask is decoded at full size.

    Args:
        codes: dicts ``{"size": [H, W], "counts": ...}``, the counts compressed (str or bytes) or a list of run lengths.
        size: (H, W) of the picture, which every code must have.

    Raises:
        ValueError: a code is of another size, or its counts are damaged or do not fill the picture.
    """

    def __init__(self, codes: Iterable[Mapping[str, Any]], size: tuple[int, int]) -> None:
        self.size = size
        self._ends = []  # where each mask's runs end, in pixels counted down the columns
        for index, code in enumerate(codes):
            try:
                self._ends.append(_run_ends(code, size))
            except ValueError as error:
                raise ValueError(f"mask {index}: {error}") from error

    def __len__(self) -> int:
        return len(self._ends)

    def crop(self, box: Region, size: tuple[int, int], keep: Sequence[int] | None = None) -> Tensor:
        """See :meth:`Masks.crop`."""
        height, width = self.size
        rows, columns = centres(box, size, height, width)
        # Enlarging repeats rows and columns; the runs are looked up once for each.
        rows, row_of = np.unique(rows, return_inverse=True)
        columns, column_of = np.unique(columns, return_inverse=True)
        positions = (columns[:, None] * height + rows).ravel()
        masks = []
        for index in _indices(keep, len(self)):
            samples = np.diff(np.searchsorted(positions, self._ends[index]), prepend=0)  # in each run
            if samples[1::2].any():
                inside = np.repeat(np.arange(len(samples)) % 2 == 1, samples)
                masks.append(inside.reshape(len(columns), len(rows)).T[np.ix_(row_of, column_of)])
        return torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), dtype=bool))


def run_lengths(counts: "str | bytes | Sequence[int]") -> NDArray[np.int64]:
    """Lengths of a COCO code's runs, beginning with zeros: compressed counts are base-32 numbers in characters.

    pycocotools decodes these too, but fills masks of truncated counts with whatever is in memory.

    Raises:
        ValueError: the counts are no such code.
    """
    if not isinstance(counts, str | bytes):
        lengths = np.asarray(counts)
        if lengths.ndim != 1 or lengths.size == 0 or lengths.dtype.kind not in "iu":
            raise ValueError(f"expected counts as a string or a list of whole numbers, got {str(counts)[:60]!r}")
        if lengths.max() > np.iinfo(np.int64).max:
            raise ValueError(f"the counts hold {lengths.max()}, a number of more than 63 bits")
        return lengths.astype(np.int64)
    text = counts.encode("utf-8") if isinstance(counts, str) else counts
    # Five bits a character, lowest first; 32 says that more follow, 16 in the last one that the number is negative.
    characters = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(characters) or characters.min() < 0 or characters.max() > 63 or characters[-1] & 32:
        raise ValueError(f"the counts of {len(text)} characters are empty, truncated or no run-length code")
    last = np.flatnonzero(characters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 12:
        raise ValueError("the counts hold a number of more than 60 bits")
    place = np.arange(len(characters)) - np.repeat(first, length)
    values = np.add.reduceat((characters & 31) << (5 * place), first)
    values -= np.where(characters[last] & 16, np.int64(1) << (5 * length), 0)
    if np.abs(values).max() > 2**40:  # no picture has so many pixels, and sums of these would overflow
        raise ValueError("the counts hold a number of more than 40 bits")
    # From the fourth on, each number is the difference to the one two before.
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _run_ends(code: Mapping[str, Any], size: tuple[int, int]) -> Positions:
    if not isinstance(code, Mapping) or not {"size", "counts"} <= code.keys():
        raise ValueError(f"expected a run-length code with size and counts, got {str(code)[:60]}")
    if list(code["size"]) != list(size):
        raise ValueError(f"a run-length code of size {list(code['size'])}, expected {list(size)}")
    lengths, pixels = run_lengths(code["counts"]), size[0] * size[1]
    if lengths.min() < 0 or lengths.max() > pixels or lengths.sum() != pixels:  # by the second, no sum overflows
        total = sum(lengths.tolist())
        raise ValueError(f"run lengths add up to {total}, expected {size[0]} x {size[1]} = {pixels}, each at least 0")
    return lengths.cumsum()


def centres(box: Region, size: tuple[int, int], height: int, width: int) -> tuple[Positions, Positions]:
    """Rows and columns of the picture on which the centres of the new pixels lie."""
    top, left, bottom, right = box
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"box (top, left, bottom, right) {tuple(box)} is empty or leaves the picture {height}x{width}")
    if min(size) < 1:
        raise ValueError(f"size must be positive, got {tuple(size)}")
    rows, columns = (2 * np.arange(count, dtype=np.int64) + 1 for count in size)
    return (
        np.floor(top + rows * (bottom - top) / (2 * size[0])).astype(np.int64),
        np.floor(left + columns * (right - left) / (2 * size[1])).astype(np.int64),
    )


def _indices(keep: Sequence[int] | None, count: int) -> Positions:
    indices = np.arange(count) if keep is None else np.asarray(keep, dtype=np.int64)
    if len(indices) and not (indices.min() >= 0 and indices.max() < count):
        raise IndexError(f"keep asks for mask {indices.min()}..{indices.max()}, there are {count}")
    return indices
