"""Points of one picture found in another, by the likeness of their upsampled features."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Size, check_points, output_size
from .model import LoftUp

__all__ = ["QUERIES", "Matches", "likeness", "match", "most_alike", "rescaled"]

QUERIES = 64  # points whose maps of likeness are held at once
ROWS = 2048  # points of the first grid that are compared with the second grid at once


@dataclass(frozen=True)
class Matches:
    """Points of one picture and where they are in another; N may be 0.

    Args:
        points: (N, 2) float32, (x, y) in pixels of the first image, centres at whole numbers.
        targets: (N, 2) float32, the same in the second.
        similarity: (N,) float32, the cosine between the two vectors, in [-1, 1].
        mutual: (N,) bool: the way back ends where it began.
    """

    points: Tensor
    targets: Tensor
    similarity: Tensor
    mutual: Tensor

    def __len__(self) -> int:
        return len(self.points)


def match(
    up: LoftUp,
    features: Tensor,
    image: Tensor,
    other_features: Tensor,
    other_image: Tensor,
    points: Tensor | None = None,
    *,
    size: Size = None,
    other_size: Size = None,
    step: int = 8,
    most: int | None = None,
) -> Matches:
    """Match points of an image with those of another by the cosine of their upsampled features.

    Without ``points`` both images are compared at the points of a grid, and those stay that are each other's nearest;
    the place of each in the second image is then looked for among all pixels within a step. With ``points`` every one
    gets the pixel of the second image that is most like it, and ``mutual`` says whether the way back ends within a cell
    of the backbone. Dense feature maps are never held. Inference only.

    Examples:
        >>> matches = match(up, backbone(a), a, backbone(b), b, most=100)   # doctest: +SKIP
        >>> viz.matches(a, b, matches.points, matches.targets)              # doctest: +SKIP

    Args:
        up: the upsampler, in ``eval()`` mode.
        features: (1, C, h, w) of the first image.
        image: (1, 3, H, W), as for the call of ``up``.
        other_features: (1, C, h', w') of the second image.
        other_image: (1, 3, H', W').
        points: (N, 2), (x, y) in pixels of ``image``, any real dtype; None for a grid.
        size: (height, width) that the first image's features are upsampled to; None means the image's. Coordinates are
            pixels of the images all the same.
        other_size: the same of the second image.
        step: pixels of ``size`` between neighbouring points of the grid.
        most: of the grid's matches keep so many, evenly spread: the image is cut into as many cells, and the most alike
            of every cell come first. None keeps all.

    Returns:
        The matches: of a grid in the order of their likeness, else in that of ``points``.

    Raises:
        ValueError: more than one image, other numbers of channels, points outside the image, ``step`` or ``most`` below
            1, both ``points`` and ``most``, or as for :meth:`LoftUp.forward` and :meth:`LoftUp.at`.
        TypeError: as there.
    """
    for name, value in (("step", step), ("most", most)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if points is not None and most is not None:
        raise ValueError(
            "most= chooses among a grid's matches, and every one of points= is kept; leave one of them out"
        )
    if len(features) != 1 or len(other_features) != 1:
        counts = f"{len(features)} and {len(other_features)}"
        raise ValueError(f"match takes one image and another, got batches of {counts}; choose one: features[:1]")
    if features.shape[1] != other_features.shape[1]:
        channels = f"{features.shape[1]} and {other_features.shape[1]}"
        raise ValueError(f"the two images have features of {channels} channels; take both from one backbone")
    first = _Side(up, features, image, output_size(size, image))
    second = _Side(up, other_features, other_image, output_size(other_size, other_image))
    with torch.no_grad():
        if points is None:
            return _grid_matches(first, second, step, most)
        if points.ndim == 2:
            points = points.to(features.device)
            check_points(points[None], features, image.shape[-2], image.shape[-1])
            return _point_matches(first, second, points)
    raise ValueError(f"points must be (N, 2), (x, y) in pixels of image, got {tuple(points.shape)}")


def likeness(vectors: Tensor) -> Callable[[Tensor], Tensor]:
    """Make a head of cosines: features (B, C, n, m) to their likeness (B, N, n, m) to vectors (N, C), in [-1, 1]."""
    queries = F.normalize(vectors.float(), dim=1)
    return lambda features: torch.einsum("bcnm,kc->bknm", F.normalize(features.float(), dim=1), queries)


def most_alike(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the greatest value of each map (N, H, W): (N, 2) float32 as (x, y), and the values (N,).

    Where several pixels are level, as all of a cell without upsampling are, it is the one nearest to their mean, so
    that no corner is preferred.
    """
    best = similarity.amax((1, 2))
    level = similarity == best[:, None, None]
    y, x = (torch.arange(side, device=best.device, dtype=torch.float32) for side in similarity.shape[1:])
    count = level.sum((1, 2))
    places = torch.stack([(level.sum(1) * x).sum(1), (level.sum(2) * y).sum(1)], 1) / count[:, None]
    for number in (count > 1).nonzero()[:, 0].tolist():
        rows, columns = level[number].nonzero(as_tuple=True)
        pixels = torch.stack([columns, rows], 1).float()
        places[number] = pixels[(pixels - places[number]).square().sum(1).argmin()]
    return places, best


def rescaled(points: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Points (N, 2), (x, y) in pixels of a grid (H, W), in pixels of another grid over the same picture, float32.

    Centres are at whole numbers. What falls outside the outermost centres of the other grid is put on them.
    """
    old, new = (torch.tensor(size[::-1], dtype=torch.float64) for size in (before, after))
    placed = (points.cpu().double() + 0.5) * new / old - 0.5
    return placed.clamp(min=0).minimum(new - 1).float().to(points.device)


@dataclass(frozen=True)
class _Side:
    """One of the two images; points are in pixels of ``size`` here."""

    up: LoftUp
    features: Tensor
    image: Tensor
    size: tuple[int, int]

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[-2], self.image.shape[-1]

    def vectors(self, points: Tensor) -> Tensor:
        """(N, C) float32 of length 1."""
        return F.normalize(self.up.at(self.features, self.image, points[None], self.size)[0].float(), dim=1)

    def grid(self, step: int) -> Tensor:
        """Points (N, 2), row by row."""
        rows, columns = (torch.arange((side - 1) % step // 2, side, step) for side in self.size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([x, y], -1).reshape(-1, 2).float().to(self.features.device)

    def find(self, vectors: Tensor, around: Tensor | None = None, radius: int = 0) -> tuple[Tensor, Tensor]:
        """Pixels (N, 2) most like vectors (N, C), and how alike; within a radius of points, if there are any."""
        places, values = [vectors.new_empty(0, 2)], [vectors.new_empty(0)]
        centres = None if around is None else around.split(QUERIES)
        for number, some in enumerate(vectors.split(QUERIES) if len(vectors) else ()):
            similarity = self.up(self.features, self.image, self.size, head=likeness(some))[0]
            if centres is not None:
                rows, columns = (torch.arange(side, device=some.device) for side in self.size)
                near_x = (columns - centres[number][:, :1]).abs() <= radius
                near_y = (rows - centres[number][:, 1:]).abs() <= radius
                similarity = similarity.masked_fill(~(near_y[:, :, None] & near_x[:, None]), -math.inf)
            for one, chunk in zip((places, values), most_alike(similarity), strict=True):
                one.append(chunk)
        return torch.cat(places), torch.cat(values)


def _point_matches(first: _Side, second: _Side, points: Tensor) -> Matches:
    starts = rescaled(points, first.whole, first.size)
    vectors = first.vectors(starts)
    places, similarity = second.find(vectors)
    back, _ = first.find(second.vectors(places))
    cell = starts.new_tensor([first.size[1] / first.features.shape[3], first.size[0] / first.features.shape[2]])
    mutual = ((back - starts).abs() <= cell).all(1)
    return Matches(points.float(), rescaled(places, second.size, second.whole), similarity.clamp(-1, 1), mutual)


def _grid_matches(first: _Side, second: _Side, step: int, most: int | None) -> Matches:
    starts, ends = first.grid(step), second.grid(step)
    vectors, others = first.vectors(starts), second.vectors(ends)
    best, similarity = [], []
    top = others.new_full((len(others),), -math.inf)
    back = torch.zeros(len(others), dtype=torch.int64, device=others.device)
    for begin in range(0, len(vectors), ROWS):
        table = vectors[begin : begin + ROWS] @ others.mT
        value, index = table.max(1)
        similarity.append(value)
        best.append(index)
        value, index = table.max(0)
        back = torch.where(value > top, index + begin, back)
        top = torch.maximum(value, top)
    there = torch.cat(best)
    mutual = (back[there] == torch.arange(len(vectors), device=back.device)).nonzero()[:, 0]
    kept = mutual[_spread(starts[mutual], torch.cat(similarity)[mutual], first.size, most)]
    places, values = second.find(vectors[kept], ends[there[kept]], step)
    order = values.argsort(descending=True, stable=True)
    points, targets = rescaled(starts[kept], first.size, first.whole), rescaled(places, second.size, second.whole)
    return Matches(points[order], targets[order], values[order].clamp(-1, 1), torch.ones_like(order, dtype=torch.bool))


def _spread(points: Tensor, similarity: Tensor, size: tuple[int, int], most: int | None) -> Tensor:
    """Numbers of the points to keep: round by round the most alike one that is left in every cell of the image."""
    if most is None or len(points) <= most:
        return torch.arange(len(points), device=points.device)
    across = max(1, min(most, round(math.sqrt(most * size[1] / size[0]))))
    down = -(-most // across)
    column, row = (points[:, 0] * across / size[1]).long(), (points[:, 1] * down / size[0]).long()
    rounds: dict[int, int] = {}
    keys: list[tuple[int, int, int]] = []
    cells = (row * across + column).tolist()
    for number in similarity.argsort(descending=True, stable=True).tolist():
        turn = rounds[cells[number]] = rounds.get(cells[number], -1) + 1
        keys.append((turn, len(keys), number))  # within a round by likeness
    return torch.tensor([number for _, _, number in sorted(keys)[:most]], device=points.device)
