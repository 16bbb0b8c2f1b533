"""Random choices for a step, and the places of the views: functions of seed, step and picture alone.

Nothing here depends on what was drawn before, so that a run resumes exactly, worker processes do not matter, and many
processes see what one with the whole batch would see.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch

from ...errors import LoftUpError
from ...networks.layers import Box
from ..config import TrainConfig
from .generators import seeded
from .regions import Region

__all__ = ["Cells", "Grids", "Plan", "View", "check_geometry", "draw_view", "grids_of", "make_plan"]

T = TypeVar("T")


@dataclass(frozen=True)
class Cells:
    """The grid of a backbone's features."""

    patch_size: int  # pixels, of which the sides of its input are multiples
    finer: int = 1  # cells along a patch's side: of shifted views there are several

    @property
    def stride(self) -> Fraction:
        """The side of a cell in pixels."""
        return Fraction(self.patch_size, self.finer)

    def along(self, size: int) -> int:
        """Cells along a side of so many pixels."""
        return size // self.patch_size * self.finer


Grids = int | Cells | Sequence[int | Cells]  # of the backbone, or of each of several; a number is a patch size


@dataclass(frozen=True)
class Plan:
    """Choices that all pictures of a step share."""

    backbone: int  # number of the backbone, of several
    size: int  # side S of the backbone's square input in pixels
    output: int  # side O of the student's output in pixels
    window: Box | None  # output pixels that the loss sees, whole feature cells; None means all
    crops: tuple[Box, ...]  # of the teacher, squares in output pixels
    factor: int  # k of the high-resolution consistency; 0 without it
    region: Box | None  # what the backbone sees enlarged k times, in k-ths of feature cells; None without it


def make_plan(config: TrainConfig, grids: Grids, step: int) -> Plan:
    """Draw what the pictures of a step share; every part has a generator of its own.

    Args:
        config: whose geometry :func:`check_geometry` has accepted.
        grids: of the backbone, or of each of several, of which one is drawn.
        step: of the optimizer.
    """
    several = grids_of(grids)
    shares = [each.share for each in config.sections.values()]
    backbone = _backbone(shares if len(shares) == len(several) else [1.0] * len(several), config.seed, step)
    size = _choice(config.data.sizes, seeded(config.seed, "size", step))
    output = round(size * _choice(config.data.ratios, seeded(config.seed, "ratio", step)))
    cells = several[backbone].along(size)
    window, square = None, None  # the latter in cells
    if config.window is not None and (side := max(1, round(config.window * cells / output))) < cells:
        square = _square(side, cells, seeded(config.seed, "window", step))
        top, left, bottom, right = (edge * (output // cells) for edge in square)
        window = (top, left, bottom, right)

    crops = []
    distillation = config.objective.self_distillation
    if distillation.weight:
        generator = seeded(config.seed, "crops", step)
        for _ in range(distillation.crops):
            zoom = _uniform(distillation.zoom, generator)
            crops.append(_square(round(output / zoom), output, generator))

    factor, region = 0, None
    consistency = config.objective.high_resolution
    if consistency.weight:
        generator = seeded(config.seed, "high resolution", step)
        factor = _choice(consistency.factors, generator)
        region = (0, 0, factor * cells, factor * cells)
        if consistency.crop:
            region = _surroundings(square, cells, factor, generator)
    return Plan(backbone, size, output, window, tuple(crops), factor, region)


def _surroundings(window: Box | None, cells: int, factor: int, generator: torch.Generator) -> Box:
    """The square of ``cells`` k-ths of cells around a window given in cells; anywhere if there is none."""
    last = (factor - 1) * cells
    if window is None:
        places = -(-last // factor) + 1  # whole cells, and the far end
        top, left = (min(factor * int(torch.randint(places, (), generator=generator)), last) for _ in range(2))
    else:
        top, left = (
            min(max((factor * (low + high) - cells) // 2, 0), last)
            for low, high in ((window[0], window[2]), (window[1], window[3]))
        )
    return top, left, top + cells, left + cells


@dataclass(frozen=True)
class View:
    """A square of a picture, in its pixels and fractions of them, seen mirrored or not."""

    top: float
    left: float
    side: float
    mirrored: bool

    def region(self, box: Region, size: float) -> Region:
        """Where a box of the view, the view being ``size`` units wide, lies in the picture."""
        top, left, bottom, right = (self.side * edge / size for edge in box)
        if self.mirrored:
            left, right = self.side - right, self.side - left
        return self.top + top, self.left + left, self.top + bottom, self.left + right


def draw_view(config: TrainConfig, height: int, width: int, generator: torch.Generator) -> View:
    """Draw a square crop of a picture of a size; it may be mirrored."""
    side = min(height, width) * _uniform(config.data.scale, generator)
    top, left = (_uniform((0, n - side), generator) for n in (height, width))
    return View(top, left, side, bool(torch.rand((), generator=generator) < config.data.flip))


def check_geometry(config: TrainConfig, grids: Grids) -> None:
    """Raise LoftUpError unless sizes, ratios, window and views fit the cells, of all backbones, and each other."""
    several = sorted(set(grids_of(grids)), key=lambda each: (each.patch_size, each.finer))
    patch_sizes = sorted({each.patch_size for each in several})
    common = math.lcm(*patch_sizes)
    for size in config.data.sizes:
        if size % common:
            near = [n * common for n in (size // common, size // common + 1) if n]
            whose = "the backbone's patch size" if len(patch_sizes) == 1 else "the backbones' patch sizes"
            raise LoftUpError(
                f"data.sizes holds {size}; expected multiples of {whose} {', '.join(map(str, patch_sizes))}, such as "
                f"{' or '.join(map(str, near))}"
            )
    for each in several:
        _check_cells(config, each)
    if config.objective.imitation.weight:
        grids = grids_of(grids)
        for number in config.objective.imitation.backbones or range(len(grids)):
            _check_imitation(config, grids[number])
    _check_crops(config)


def _check_cells(config: TrainConfig, grid: Cells) -> None:
    data, objective = config.data, config.objective
    terms = {
        "window": config.window,
        "objective.high_resolution": objective.high_resolution.weight,
        "objective.multi_view": objective.multi_view.weight,
    }
    whole = [name for name, on in terms.items() if on]
    for size, ratio in itertools.product(data.sizes, data.ratios):
        output, cells = round(size * ratio), grid.along(size)
        if output < cells:
            raise LoftUpError(f"data.ratios holds {ratio:g}, which makes the output coarser than the features")
        if whole and output % cells:
            raise LoftUpError(
                f"data.ratios holds {ratio:g}, which at {size} gives {output / cells:g} output pixels for a feature "
                f"cell of {grid.stride}; whole ones are needed for {' and '.join(whole)}: take whole multiples of "
                f"{1 / grid.stride}"
            )
    if objective.high_resolution.weight:
        finest = min(data.ratios) * grid.stride
        if (factor := max(objective.high_resolution.factors)) > finest:
            raise LoftUpError(
                f"objective.high_resolution.factors holds {factor}, a target finer than the output, which has "
                f"{finest:g} pixels for a feature cell; take smaller factors or larger data.ratios"
            )
        # So many k-ths of cells hold a whole cell wherever they begin.
        if objective.high_resolution.crop and (cells := grid.along(min(data.sizes))) < 2 * factor - 1:
            raise LoftUpError(
                f"objective.high_resolution.factors holds {factor}, and with objective.high_resolution.crop=true the "
                f"part of {min(data.sizes)} pixels that is seen enlarged may hold none of the {cells} x {cells} "
                f"feature cells whole; take factors of at most {(cells + 1) // 2}, data.sizes of at least "
                f"{-(-(2 * factor - 1) // grid.finer) * grid.patch_size}, or crop=false"
            )


def _check_imitation(config: TrainConfig, grid: Cells) -> None:
    """Raise LoftUpError unless the student's and the teacher's outputs are whole multiples of the cells."""
    data, ratio = config.data, config.objective.imitation.ratio
    for size, students in itertools.product(data.sizes, data.ratios):
        output, theirs, cells = round(size * students), round(size * ratio), grid.along(size)
        if not theirs or theirs % cells or output % cells or max(output, theirs) % min(output, theirs):
            raise LoftUpError(
                f"objective.imitation.ratio={ratio:g} makes the teacher's output {theirs} pixels wide for an input of "
                f"{size}, the student's is {output}, and the features have {cells} cells; one of the outputs must be a "
                "whole multiple of the other, and both of the cells"
            )


def _check_crops(config: TrainConfig) -> None:
    data, objective = config.data, config.objective
    if objective.self_distillation.weight and max(data.ratios) > (zoom := min(objective.self_distillation.zoom)):
        raise LoftUpError(
            f"data.ratios holds {max(data.ratios):g} and objective.self_distillation.zoom begins at {zoom:g}: the "
            "teacher's output of a crop would be coarser than the student's; zoom must be at least the ratio"
        )
    smallest = min(round(size * ratio) for size, ratio in itertools.product(data.sizes, data.ratios))
    if objective.self_distillation.weight and round(smallest / (zoom := max(objective.self_distillation.zoom))) < 1:
        raise LoftUpError(
            f"objective.self_distillation.zoom ends at {zoom:g}, which leaves less than a pixel of an output of "
            f"{smallest}; take less than {2 * smallest}"
        )


def grids_of(grids: Grids) -> list[Cells]:
    """The grid of each backbone."""
    several = [grids] if isinstance(grids, int | Cells) else grids
    return [each if isinstance(each, Cells) else Cells(each) for each in several]


def _backbone(shares: Sequence[float], seed: int, step: int) -> int:
    generator = seeded(seed, "backbone", step)
    if len(set(shares)) == 1:
        return _choice(range(len(shares)), generator)
    return int(torch.multinomial(torch.tensor(shares, dtype=torch.float64), 1, generator=generator))


def _choice(values: Sequence[T], generator: torch.Generator) -> T:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _uniform(bounds: Sequence[float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _square(side: int, whole: int, generator: torch.Generator) -> Box:
    top, left = (int(torch.randint(whole - side + 1, (), generator=generator)) for _ in range(2))
    return top, left, top + side, left + side
