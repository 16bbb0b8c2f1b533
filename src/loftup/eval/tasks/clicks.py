"""Clicks of a simulated user, and their maps, which a network gets (paper section 4, table 5)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import translate

__all__ = ["Click", "click_maps", "first_click", "inside_click", "next_click", "similarity_maps"]


@dataclass(frozen=True)
class Click:
    """A pixel of a picture that is said to be of the object, or not."""

    row: int
    column: int
    positive: bool = True

    def scaled(self, old: tuple[int, int], new: tuple[int, int]) -> "Click":
        """The same place in a picture of another size, (H, W) each."""
        row, column = (int((at + 0.5) * to / of) for at, of, to in zip((self.row, self.column), old, new, strict=True))
        return Click(row, column, self.positive)


def first_click(mask: Tensor) -> Click:
    """The pixel of a mask (H, W) bool that is farthest from its boundary, the picture's border included.

    Raises:
        ValueError: the mask is empty.
    """
    return _farthest(_inside(mask))


def inside_click(mask: Tensor, generator: torch.Generator) -> Click:
    """A random pixel of a mask, of those at least half as far from its boundary as :func:`first_click`'s.

    Raises:
        ValueError: the mask is empty.
    """
    distance = _inside(mask)
    pixels = (distance >= distance.max() / 2).nonzero()
    row, column = pixels[int(torch.randint(len(pixels), (), generator=generator))].tolist()
    return Click(row, column)


def next_click(prediction: Tensor, truth: Tensor, clicks: list[Click]) -> Click | None:
    """The correction that a user makes: a click in the middle of the larger error.

    Of pixels missed and pixels wrongly taken, the region that reaches farther from its boundary is clicked, there.

    Args:
        prediction: (H, W) bool.
        truth: (H, W) int64: 1 object, 0 not, -1 not judged and never clicked.
        clicks: made so far, not to be repeated.

    Returns:
        None where nothing is wrong, or all that is has been clicked.
    """
    free = torch.ones_like(prediction)
    for click in clicks:
        free[click.row, click.column] = False
    misses, extras = (truth == 1) & ~prediction, (truth == 0) & prediction
    depths = [_distance(error) * free for error in (misses, extras)]
    positive = bool(depths[0].max() > depths[1].max())
    deepest = depths[0] if positive else depths[1]
    return _farthest(deepest, positive) if deepest.max() > 0 else None


def click_maps(clicks: list[Click], size: tuple[int, int], radius: float) -> Tensor:
    """Maps of clicks: discs and decays, (4, H, W) in [0, 1].

    Args:
        clicks: in pixels of ``size``.
        size: (H, W).
        radius: of the discs in pixels.

    Returns:
        Disc of the positive and of the negative clicks, and exp(-d / s) of the distance d to the nearest of either,
        where s is a tenth of the picture's shorter side; all 0 where there is no such click.
    """
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    maps = torch.zeros(4, *size)
    for index, positive in enumerate((True, False)):
        for click in clicks:
            if click.positive == positive:
                distance = ((rows - click.row) ** 2 + (columns - click.column) ** 2).sqrt()
                maps[index] = torch.maximum(maps[index], (distance <= radius).float())
                maps[index + 2] = torch.maximum(maps[index + 2], (-distance / (0.1 * min(size))).exp())
    return maps


def similarity_maps(features: Tensor, clicks: list[Click]) -> Tensor:
    """Likeness to clicks: the cosine to their pixels' features, the mean over the picture taken off.

    Args:
        features: (C, H, W).
        clicks: in pixels of the features' grid.

    Returns:
        (2, H, W) in [-1, 1]: the greatest over the positive and over the negative clicks, 0 without any.
    """
    units = F.normalize(features - features.mean((1, 2), keepdim=True), dim=0)
    maps = features.new_zeros(2, *features.shape[1:])
    for index, positive in enumerate((True, False)):
        at = [(click.row, click.column) for click in clicks if click.positive == positive]
        if at:
            rows, columns = torch.tensor(at, device=features.device).T
            maps[index] = torch.einsum("chw,cn->nhw", units, units[:, rows, columns]).amax(0)
    return maps


def _inside(mask: Tensor) -> Tensor:
    if not mask.any():
        raise ValueError("there is nothing to click: the mask is empty")
    return _distance(mask)


def _distance(mask: Tensor) -> Tensor:
    """Distance (H, W) of every pixel of a mask to the nearest one that is not, beyond the border included."""
    with translate(ImportError, 'clicks need SciPy: pip install "loftup[eval]"'):
        from scipy.ndimage import distance_transform_edt
    padded = F.pad(mask, (1, 1, 1, 1))
    return torch.from_numpy(distance_transform_edt(padded.numpy()))[1:-1, 1:-1]


def _farthest(distance: Tensor, positive: bool = True) -> Click:
    row, column = divmod(int(distance.argmax()), distance.shape[1])
    return Click(row, column, positive)
