"""Readers of pairs of pictures with points that belong together."""

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LoftUpError, translate
from ...files import expect_file
from ...pictures import IMAGE_SUFFIXES
from .base import CorrespondenceSample, Dataset, Samples
from .files import list_files, read_image, read_lines
from .registry import register

__all__ = ["SEEN", "homography", "pairs", "spair", "warped"]

PAIRS, KEYS = "pairs.json", ("source", "target", "source_points", "target_points")
POINTS = 20  # of a photograph that are followed to its warped view
TURN, LEAST, SEEN, BEND = 30.0, 0.5, 0.85, 0.08  # degrees; shares of the sides that a view shows; shift of its corners


@register("spair", "pairs")
def spair(root: Path) -> Dataset[CorrespondenceSample]:
    """SPair-71k: ``Layout/large/{trn,test}.txt`` lists ``PairAnnotation/SPLIT/*.json`` and ``JPEGImages/CATEGORY``.

    Judged are the test pairs, as is usual. Min et al., *SPair-71k: A Large-scale Benchmark for Semantic
    Correspondence*, 2019.
    """

    def split(name: str) -> Samples[CorrespondenceSample]:
        lines = read_lines(root / "Layout" / "large" / f"{name}.txt", "a list of pairs")
        return Samples([root / "PairAnnotation" / name / f"{line}.json" for line in lines], partial(_spair_pair, root))

    train = split("trn") if (root / "Layout" / "large" / "trn.txt").is_file() else []
    return Dataset("spair", train, split("test"))


def _spair_pair(root: Path, file: Path) -> CorrespondenceSample:
    if not file.is_file():  # some file systems, and what unpacks to them, have no colons in names
        file = file.with_name(file.name.replace(":", "_"))
    record = _read_json(file, "the annotation of a pair")
    try:
        folder = root / "JPEGImages" / record["category"]
        names = {f"{new}_points": record[f"{old}_kps"] for old, new in (("src", "source"), ("trg", "target"))}
        names |= {"source": record["src_imname"], "target": record["trg_imname"], "category": record["category"]}
        names["target_box"] = record["trg_bndbox"]
    except (KeyError, TypeError) as error:
        raise LoftUpError(f"expected the annotation of a pair in {file}, with {error}; got another") from error
    return _sample(names, folder, file.stem, file)


@register("pairs", "pairs")
def pairs(root: Path) -> Dataset[CorrespondenceSample]:
    """Pairs of one's own: ``pairs.json``, a list of objects, beside the pictures.

    Each has ``source`` and ``target``, paths of pictures from the folder on; ``source_points`` and ``target_points``,
    as many lists [x, y] in pixels, centres at whole numbers; and maybe ``target_box``, [left, top, right, bottom], and
    ``category``. Other keys are left aside, so that files of ``loftup match --json`` serve too.
    """
    file = root / PAIRS
    records = _read_json(file, "a list of pairs of pictures")
    if not isinstance(records, list) or not records:
        raise LoftUpError(f"expected a list of pairs in {file}, got {str(records)[:80]}")
    for number, record in enumerate(records):
        lacking = [key for key in KEYS if not isinstance(record, Mapping) or key not in record]
        if lacking:
            raise LoftUpError(f"pair {number} of {file} has no {', '.join(lacking)}; expected {', '.join(KEYS)}")

    def read(number: int) -> CorrespondenceSample:
        sample = _sample(records[number], root, str(number), file)
        _check_inside(sample.source_points, sample.source, f"source_points of pair {number} of {file}")
        _check_inside(sample.target_points, sample.target, f"target_points of pair {number} of {file}")
        return sample

    return Dataset(root.resolve().name, [], Samples(range(len(records)), read))


def _sample(record: Mapping[str, Any], folder: Path, name: str, file: Path) -> CorrespondenceSample:
    """The pair of a record as in ``pairs.json``; ``file`` is for messages."""
    where = f"pair {name} of {file}"
    images, points = [], []
    for side in ("source", "target"):
        image = read_image(folder / str(record[side]))
        images.append(image)
        points.append(_points(record[f"{side}_points"], f"{side}_points of {where}"))
    if len(points[0]) != len(points[1]):
        raise LoftUpError(f"{where} has {len(points[0])} source_points and {len(points[1])} target_points")
    box = record.get("target_box")
    if box is not None:
        with translate((TypeError, ValueError), f"target_box of {where} must be [left, top, right, bottom], got {box}"):
            left, top, right, bottom = (float(number) for number in box)
            if not (left < right and top < bottom):
                raise ValueError
            box = left, top, right, bottom
    return CorrespondenceSample(name, images[0], images[1], points[0], points[1], box, str(record.get("category", "")))


def _points(values: Any, name: str) -> Tensor:
    """(N, 2) float32, N > 0."""
    with translate((TypeError, ValueError), f"{name} must be lists [x, y], got {str(values)[:80]}"):
        points = torch.from_numpy(np.array(values, dtype=np.float32))
        if points.ndim != 2 or points.shape[1] != 2 or not len(points):
            raise ValueError
    return points


def _check_inside(points: Tensor, image: Tensor, name: str) -> None:
    height, width = image.shape[1:]
    outside = ~((points >= -0.5) & (points <= points.new_tensor([width, height]) - 0.5)).all(1)
    if bool(outside.any()):
        raise LoftUpError(
            f"{name} hold {points[outside][0].tolist()}, outside the picture of {width} x {height} pixels; expected "
            "(x, y), centres of pixels at whole numbers"
        )


def _read_json(file: Path, content: str) -> Any:
    expect_file(file, content)
    with translate((ValueError, RecursionError), lambda error: f"{file} is no JSON: {error}"):
        return json.loads(file.read_text("utf-8"))


@register("warped", "pairs")
def warped(root: Path) -> Dataset[CorrespondenceSample]:
    """Photographs of a folder, each with a view of itself by a known homography, and random points of the view.

    The view shows a part of the photograph, turned, larger and bent, in the photograph's size. What it does is told by
    the file's name, so that a folder always gives the same pairs.
    """
    files = [path for path in list_files(root, "*.*", "photographs") if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise LoftUpError(f"expected photographs in {root}, found none of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return Dataset("warped", [], Samples(files, _warped_pair))


def _warped_pair(file: Path) -> CorrespondenceSample:
    image = read_image(file)
    height, width = image.shape[1:]
    generator = torch.Generator().manual_seed(zlib.crc32(file.name.encode("utf-8", "surrogateescape")))
    matrix = homography(height, width, generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sides = torch.tensor([width, height])
    across = (2 * _through(matrix, torch.stack([columns, rows], -1).reshape(-1, 2).double()) + 1) / sides - 1
    grid = across.view(1, height, width, 2).float()
    view = F.grid_sample(image[None].float(), grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
    targets = torch.rand(POINTS, 2, generator=generator) * (sides - 1)
    sources = _through(matrix, targets.double()).float()
    return CorrespondenceSample(file.stem, image, view.clamp(0, 255).round().byte(), sources, targets)


def homography(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw the map from pixels of a view to those of a picture of the same size, all inside it.

    Returns:
        (3, 3) float64, for points (x, y, 1).
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)

    sides = torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64)
    corners = torch.tensor([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)], dtype=torch.float64)
    angle = torch.deg2rad(draw(-TURN, TURN))
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    quad = (draw(LEAST, SEEN) * (corners + draw(-BEND, BEND, 4, 2)) * sides) @ turn.mT
    low, high = quad.amin(0), quad.amax(0)
    quad = quad * (SEEN * sides / (high - low)).amin().clamp(max=1)
    low, high = quad.amin(0), quad.amax(0)
    quad = quad + draw(0, 1, 2) * (sides - (high - low)) - low
    # Eight equations for eight numbers: corner (u, v) of the view goes to (x, y) of the picture.
    view = (corners + 0.5) * sides
    rows = []
    for (u, v), (x, y) in zip(view.tolist(), quad.tolist(), strict=True):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
    solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), quad.flatten())
    return torch.cat([solution, solution.new_ones(1)]).view(3, 3)


def _through(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (N, 2) float64 where a homography puts them."""
    placed = F.pad(points, (0, 1), value=1.0) @ matrix.mT
    return placed[:, :2] / placed[:, 2:]
