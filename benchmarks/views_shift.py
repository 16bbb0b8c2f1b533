"""Shifts of whole pixels against exact ones: where a part of the stride is no whole pixel, what should views do?

    python benchmarks/views_shift.py --backbone NAME --backbone-weights FILE --layer K --dataset NAME:FOLDER [...]

Contenders take the features of 4 (or --views) shifted views, interleaved as loftup does; they differ in the shift:

- "floor": whole pixels, rounded down (-4 and 3 for a patch of 14), what loftup does;
- "nearest": whole pixels, rounded to the nearest, halves down;
- "bilinear", "bicubic": the exact shift (-3.5 and 3.5), the picture interpolated between its pixels.

Each is followed by bilinear interpolation and by "any" (--upsampler), and judged by the linear probes of loftup eval
on pixels drawn from every picture: one trained on the upsampled features, one on the backbone's own ("kept"). Rows of
one view stand beside them. The result is a CSV with a row for every dataset, shift and upsampler; a run that was cut
off goes on.
"""

import argparse
import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from loftup import Backbone, load_backbone
from loftup.backbones.views import shifted, shifts_a_side
from loftup.eval.datasets import open_dataset
from loftup.eval.features import extract
from loftup.eval.tasks.segmentation import SegmentationConfig, segmentation
from loftup.eval.upsamplers import Upsampler, create
from loftup.eval.upsamplers.anew import Anew, AnewInAStream

SHIFTS = ("floor", "nearest", "bilinear", "bicubic")
METRICS = ("miou", "boundary_miou", "lowres_probe_miou", "lowres_probe_boundary_miou")
COLUMNS = ("dataset", "backbone", "layer", "patch", "views", "shift", "upsampler", "seeds", *METRICS)


def exact_offsets(stride: int, count: int) -> list[Fraction]:
    """The shifts of ``count`` views a side in pixels, as they should be."""
    return [Fraction((2 * index - count + 1) * stride, 2 * count) for index in range(count)]


def move(image: Tensor, down: Fraction, right: Fraction, how: str) -> Tensor:
    """Move a window over an image (B, 3, H, W) by parts of pixels, with reflection outside."""
    if how in ("floor", "nearest"):
        pixels = [math.floor(each) if how == "floor" else math.ceil(each - Fraction(1, 2)) for each in (down, right)]
        return shifted(image, pixels[0], pixels[1])
    margin = 3  # pixels around, of which interpolation needs two
    whole = [math.floor(each) for each in (down, right)]
    larger = shifted(image, whole[0], whole[1], border=2 * margin)
    height, width = image.shape[-2:]
    places = [
        torch.arange(side) + margin + float(each - floor)
        for side, each, floor in zip((height, width), (down, right), whole, strict=True)
    ]
    rows, columns = (2 * (at + 0.5) / (side + 2 * margin) - 1 for at, side in zip(places, (height, width), strict=True))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None].to(image)
    return F.grid_sample(larger, grid.expand(len(image), -1, -1, -1), mode=how, align_corners=False)


def look_at(backbone: Backbone, views: int, how: str) -> Callable[[Tensor], Tensor]:
    """Features (B, C, n * h, n * w) of images (B, 3, H, W) in [0, 1]; ``how`` is one of SHIFTS."""
    count = shifts_a_side(views)
    moves = exact_offsets(backbone.patch_size, count)

    def look(image: Tensor) -> Tensor:
        size = backbone.input_size(image.shape[2], image.shape[3])
        if size != tuple(image.shape[2:]):
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        grids = [extract(backbone, move(image, down, right, how)) for down in moves for right in moves]
        return rearrange(grids, "(i j) b c h w -> b c (h i) (w j)", i=count)

    return look


def contender(backbone: Backbone, views: int, how: str, upsampler: str) -> Upsampler:
    """An upsampler of loftup eval on views that are shifted in one of the ways; on one view where ``how`` is ""."""
    inner = create(upsampler, backbone)
    if not how:
        return inner
    return (AnewInAStream if hasattr(inner, "at") else Anew)(look_at(backbone, views, how), inner)


def thinned(samples: Sequence[Any], most: int | None) -> Sequence[Any]:
    """At most so many, evenly spread."""
    if most is None or len(samples) <= most:
        return samples
    return [samples[index * len(samples) // most] for index in range(most)]


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="dinov2_vits14")
    add("--backbone-weights", metavar="FILE")
    add("--layer", type=int)
    add("--dataset", nargs="+", required=True, metavar="NAME:FOLDER", help="as loftup eval segmentation takes them")
    add("--upsampler", nargs="+", default=["bilinear", "loftup:any"], metavar="NAME")
    add("--views", type=int, default=4, choices=(4, 9, 16))
    add("--size", type=int, nargs=2, default=[224, 224], metavar=("H", "W"))
    add("--scale", type=float, default=0.5, metavar="X", help="output over input size (default: %(default)s)")
    add("--seeds", type=int, default=1)
    add("--points", type=int, default=500)
    add("--most", type=int, metavar="N", help="at most so many pictures of each split, evenly spread")
    add("--device", default="cpu")
    add("-o", "--output", type=Path, default=Path("views_shift.csv"))
    given = parser.parse_args()

    backbone = load_backbone(given.backbone, weights=given.backbone_weights, layer=given.layer).to(given.device)
    config = SegmentationConfig(
        size=given.size,
        output=given.scale,
        seeds=given.seeds,
        pictures=0,
        device=given.device,
        training="samples",
        points=given.points,
        probes=["upsampled", "lowres"],
    )
    rows = list(csv.DictReader(given.output.open())) if given.output.exists() else []
    for spec in given.dataset:
        dataset = open_dataset(spec, "segmentation")
        splits = {split: thinned(getattr(dataset, split), given.most) for split in ("train", "val")}
        dataset = dataclasses.replace(dataset, **splits)
        for how in ("", *SHIFTS):
            for upsampler in given.upsampler:
                row = {
                    "dataset": dataset.name,
                    "backbone": given.backbone,
                    "layer": str(given.layer),
                    "patch": str(backbone.patch_size),
                    "views": str(given.views if how else 1),
                    "shift": how,
                    "upsampler": upsampler,
                    "seeds": str(given.seeds),
                }
                if any(all(old[key] == value for key, value in row.items()) for old in rows):
                    continue
                up = contender(backbone, given.views, how, upsampler)
                if isinstance(up, torch.nn.Module):
                    up.to(given.device)
                metrics = segmentation(backbone, up, dataset, config).metrics
                rows.append(row | {name: f"{fmean(metrics[name]):.2f}" for name in METRICS})
                print(", ".join(f"{name} {rows[-1][name]}" for name in COLUMNS), flush=True)
                with given.output.open("w", newline="") as file:
                    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    table.writeheader()
                    table.writerows(rows)


if __name__ == "__main__":
    main()
