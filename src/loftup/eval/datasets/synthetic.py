"""Rendered scenes of textured shapes with exact labels, depth, normals and motion: every task without a download."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..catalogue import TASKS
from .base import CorrespondenceSample, Dataset, GeometrySample, InteractiveSample, Samples, SegmentationSample

__all__ = [
    "CLASSES",
    "COLOURS",
    "FOCAL",
    "LATER",
    "MOST_OBJECTS",
    "Rendered",
    "SyntheticVideo",
    "origins",
    "render",
    "synthetic",
]

CLASSES = ("ground", "wall", "ball", "box", "triangle", "star", "cross", "ring")
COLOURS = (
    (120, 110, 90),
    (170, 180, 200),
    (220, 60, 50),
    (60, 130, 220),
    (250, 200, 40),
    (160, 70, 200),
    (60, 180, 90),
    (240, 130, 190),
)
FOCAL = 1.2  # focal length, in widths of the picture
CAMERA_HEIGHT, WALL = 1.0, 7.0  # metres
LIGHT = (-0.4, -0.7, -0.6)
MOST_OBJECTS = 4
LATER, POINTS = 8, 20  # frames between the pictures of a pair, and points that are followed
SMALLEST = 0.01  # visible share of the picture that makes a shape an object to select


@dataclass(frozen=True)
class _Shape:
    kind: int  # index into CLASSES, from 2
    centre: tuple[float, float]  # of the picture, x right and y down, in widths
    radius: float
    depth: float  # of the centre in metres
    tilt: tuple[float, float]  # slope of the plane, in x and y of the normal
    angle: float
    phase: float
    colour: tuple[float, float, float]
    velocity: tuple[float, float]  # in widths a frame


@dataclass(frozen=True)
class Rendered:
    """A scene as a pinhole camera sees it."""

    image: Tensor  # (3, H, W) uint8
    classes: Tensor  # (H, W) int64, indices into CLASSES
    objects: Tensor  # (H, W) int64: 0 background, 1, 2, ... the shapes
    depth: Tensor  # (H, W) float32 in metres
    normals: Tensor  # (3, H, W) float32, unit vectors that face the camera; those of balls as seen from far away


def render(seed: int, size: int, time: float = 0.0) -> Rendered:
    """Render the scene of a seed as a square picture.

    Args:
        seed: tells shapes, textures and colours.
        size: pixels of a side.
        time: frames since the beginning; every shape moves in a straight line.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _shapes(generator)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size - 0.5] * 2, indexing="ij")
    rays = torch.stack([x / FOCAL, y / FOCAL, torch.ones_like(x)])

    ground = torch.where(y > 0, CAMERA_HEIGHT * FOCAL / y.clamp(min=1e-6), math.inf)
    depth = ground.clamp(max=WALL)
    classes = (ground >= WALL).long()
    objects = torch.zeros_like(classes)
    upwards, towards = (torch.tensor(values)[:, None, None] for values in ([0.0, -1, 0], [0.0, 0, -1]))
    normals = torch.where(classes == 0, upwards, towards)
    # Textures live on the surfaces: of the ground and the wall, in metres.
    points = rays * depth
    albedo = torch.where(
        classes == 0,
        _paint(points[0], points[2], 0, (0.47, 0.43, 0.36), 0.3),
        _paint(points[0], points[1], 1, (0.66, 0.7, 0.78), 0.7),
    )
    for number, shape in enumerate(shapes, start=1):
        at_time = replace(
            shape,
            centre=tuple(c + v * time for c, v in zip(shape.centre, shape.velocity, strict=True)),  # type: ignore[arg-type]
        )
        mask, its_depth, its_normals, paint = _project(at_time, x, y, rays)
        front = mask & (its_depth < depth)
        depth, classes = torch.where(front, its_depth, depth), torch.where(front, shape.kind, classes)
        objects = torch.where(front, number, objects)
        normals, albedo = torch.where(front, its_normals, normals), torch.where(front, paint, albedo)
    light = F.normalize(torch.tensor(LIGHT), dim=0)
    shading = 0.55 + 0.45 * (normals * light[:, None, None]).sum(0).clamp(min=0)
    grain = 0.02 * torch.randn(3, size, size, generator=generator)
    image = ((albedo * shading + grain).clamp(0, 1) * 255).round().byte()
    return Rendered(image, classes, objects, depth.float(), normals.float())


def _shapes(generator: torch.Generator) -> list[_Shape]:
    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    shapes = []
    for _ in range(int(draw(2, MOST_OBJECTS + 1))):
        kind = int(draw(2, len(CLASSES)))
        base = [channel / 255 for channel in COLOURS[kind]]
        colour = tuple(min(1.0, max(0.0, channel + draw(-0.1, 0.1))) for channel in base)
        shapes.append(
            _Shape(
                kind,
                (draw(-0.35, 0.35), draw(-0.3, 0.35)),
                draw(0.08, 0.2),
                draw(1.2, 2.6),
                (draw(-0.35, 0.35), draw(-0.35, 0.35)),
                draw(0, 2 * math.pi),
                draw(0, 10),
                colour,  # type: ignore[arg-type]
                (draw(-0.012, 0.012), draw(-0.008, 0.008)),
            )
        )
    return shapes


def _project(shape: _Shape, x: Tensor, y: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View of a shape alone: its mask, depth, normals and colours."""
    u, v = (x - shape.centre[0]) / shape.radius, (y - shape.centre[1]) / shape.radius
    cosine, sine = math.cos(shape.angle), math.sin(shape.angle)
    u, v = cosine * u + sine * v, cosine * v - sine * u
    distance = (u**2 + v**2).sqrt()
    paint = _paint(u, v, shape.kind, shape.colour, shape.phase)
    if CLASSES[shape.kind] == "ball":
        bulge = (1 - distance.clamp(max=1) ** 2).sqrt()
        metres = shape.radius * shape.depth / FOCAL
        outward = torch.stack([(x - shape.centre[0]) / shape.radius, (y - shape.centre[1]) / shape.radius, -bulge])
        return distance < 1, shape.depth - metres * bulge, F.normalize(outward, dim=0), paint
    normal = F.normalize(torch.tensor([*shape.tilt, -1.0]), dim=0)
    centre = shape.depth * torch.tensor([shape.centre[0] / FOCAL, shape.centre[1] / FOCAL, 1.0])
    depth = (normal @ centre) / (normal[:, None, None] * rays).sum(0)
    return _OUTLINES[CLASSES[shape.kind]](u, v, distance), depth, normal[:, None, None].expand(3, *x.shape), paint


def _star(u: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    return distance < 0.7 + 0.3 * torch.cos(5 * torch.atan2(v, u))


_OUTLINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "box": lambda u, v, distance: (u.abs() < 0.8) & (v.abs() < 0.6),
    "triangle": lambda u, v, distance: (v < 0.6) & (v > 1.8 * u.abs() - 1),
    "star": _star,
    "cross": lambda u, v, distance: ((u.abs() < 0.3) & (v.abs() < 1)) | ((v.abs() < 0.3) & (u.abs() < 1)),
    "ring": lambda u, v, distance: (distance < 1) & (distance > 0.45),
}


def _paint(u: Tensor, v: Tensor, kind: int, colour: tuple[float, float, float], phase: float) -> Tensor:
    """Colour (3, H, W) of a texture at surface coordinates; every class has a pattern of its own."""
    wave = (
        lambda: torch.sin(3 * u + phase) * torch.sin(2.3 * v + 2 * phase),  # ground: patches
        lambda: torch.sin(9 * v + phase).sign() * 0.6,  # wall: courses
        lambda: torch.sin(5 * v + 2 * torch.sin(2 * u + phase)),  # ball: wavy bands
        lambda: torch.sin(10 * u + phase).sign(),  # box: stripes
        lambda: (torch.sin(9 * u + phase) * torch.sin(9 * v)).sign(),  # triangle: checks
        lambda: torch.cos(14 * (u**2 + v**2).sqrt() + phase),  # star: rings
        lambda: torch.sin(12 * (u + v) + phase),  # cross: diagonals
        lambda: ((torch.sin(8 * u + phase) > 0.3) & (torch.sin(8 * v) > 0.3)).float() * 2 - 1,  # ring: dots
    )[kind]()
    return torch.tensor(colour)[:, None, None] * (0.85 + 0.15 * wave)


def _segmentation(seed: int, size: int) -> SegmentationSample:
    scene = render(seed, size)
    return SegmentationSample(str(seed), scene.image, scene.classes)


def _geometry(seed: int, size: int) -> GeometrySample:
    scene = render(seed, size)
    return GeometrySample(str(seed), scene.image, scene.depth, scene.normals)


def _interactive(seed: int, size: int) -> InteractiveSample:
    scene = render(seed, size)
    areas = scene.objects.flatten().bincount()
    areas[0] = 0
    if areas.max() < SMALLEST * size**2:  # nothing to click on: another scene
        return _interactive(seed + 1_000_003, size)
    return InteractiveSample(str(seed), scene.image, (scene.objects == areas.argmax()).long())


def origins(seed: int, size: int, time: float) -> tuple[Tensor, Tensor]:
    """Where the surfaces of a scene were at time 0.

    Returns:
        Objects (H, W) int64 as in :class:`Rendered`, and (H, W, 2) float32, (x, y) in pixels of the scene at time 0.
    """
    objects = render(seed, size, time).objects
    shapes = _shapes(torch.Generator().manual_seed(seed))
    moves = torch.tensor([(0.0, 0.0), *(shape.velocity for shape in shapes)]) * time * size
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return objects, torch.stack([columns, rows], -1) - moves[objects]


def _correspondence(seed: int, size: int) -> CorrespondenceSample:
    """The scene at two times, and points that are seen at both: as many on shapes as behind them, where there are."""
    before = render(seed, size)
    objects, places = origins(seed, size, LATER)
    last = size - 1
    seen = ((places >= 0) & (places <= last)).all(-1)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the same surface all around
        x, y = (places.floor().long() + torch.tensor(corner)).clamp(0, last).unbind(-1)
        seen &= before.objects[y, x] == objects
    on, behind = seen & (objects > 0), seen & (objects == 0)
    weights = on / on.sum().clamp(min=1) + behind / behind.sum().clamp(min=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(weights.flatten(), min(POINTS, int(seen.sum())), generator=generator)
    targets = torch.stack([chosen % size, chosen // size], 1).float()
    after = render(seed, size, LATER).image
    return CorrespondenceSample(str(seed), before.image, after, places.flatten(0, 1)[chosen].float(), targets)


@dataclass(frozen=True)
class SyntheticVideo:
    """Shapes in motion; they stay in front of one another in the order of their depths."""

    seed: int
    size: int
    frames: int = 10

    @property
    def name(self) -> str:
        """The seed."""
        return str(self.seed)

    def __len__(self) -> int:
        return self.frames

    def frame(self, index: int) -> Tensor:
        """(3, H, W) uint8."""
        return render(self.seed, self.size, index).image

    def annotation(self, index: int) -> Tensor:
        """(H, W) int64: 0 background, then the shapes that are seen in frame 0."""
        first = render(self.seed, self.size).objects.unique()
        numbers = torch.zeros(MOST_OBJECTS + 1, dtype=torch.int64)
        visible = first[first > 0]
        numbers[visible] = torch.arange(1, len(visible) + 1)
        return numbers[render(self.seed, self.size, index).objects]


_MAKERS: dict[str, Callable[..., Any]] = {
    "labels": _segmentation,
    "geometry": _geometry,
    "objects": _interactive,
    "pairs": _correspondence,
    "sequences": SyntheticVideo,
}


def synthetic(task: str, *, train: int = 64, val: int = 24, size: int = 224) -> Dataset[Any]:
    """Rendered scenes for a task: 6 kinds of shapes on a ground before a wall, up to 4 in a picture.

    Args:
        task: a name of :data:`loftup.eval.catalogue.TASKS`; one on sequences gets ``val // 4`` of 10 frames.
        train: scenes to learn from.
        val: scenes to judge by, others.
        size: pixels of a side.

    Raises:
        ValueError: there is no such task.
    """
    tasks = [name for name, entry in TASKS.items() if entry.data in _MAKERS]
    if task not in tasks:
        raise ValueError(f"there are no scenes for the task {task!r}; expected one of {', '.join(tasks)}")
    kind = TASKS[task].data
    make = partial(_MAKERS[kind], size=size)
    if kind == "sequences":
        val = max(1, val // 4)
    if kind in ("sequences", "pairs"):  # of which nothing is learned
        train = 0
    # The entries are the seeds of the scenes.
    learn, judge = Samples(range(train), make), Samples(range(500_000, 500_000 + val), make)
    return Dataset("synthetic", learn, judge, CLASSES, COLOURS)
