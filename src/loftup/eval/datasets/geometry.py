"""Readers of depth and surface normal datasets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import LoftUpError
from ...files import expect_file
from .base import Dataset, GeometrySample, Samples
from .files import check_size, list_files, read_image, read_map
from .plane_fit import normals_by_plane_fit
from .registry import register
from .simple import has_simple_layout, named_files

__all__ = ["navi", "normals_from_depth", "nyuv2"]

# Of NYUv2's colour camera, in pixels of its frames of 640 x 480: focal lengths, principal point, and the part of a
# frame (rows, columns) in which depth is judged (Eigen et al. 2014), without the white border.
FOCAL = (518.8579, 519.4696)
CENTRE = (325.5824, 253.7362)
CROP = ((45, 471), (41, 601))
WIDTH = 640
RELIABLE = 4.0  # metres: beyond, the sensor's steps of depth are too coarse for normals


def _depth(file: Path) -> Tensor:
    """Metres, NaN where unknown."""
    millimetres = read_map(file, "a 16-bit depth map in millimetres")
    return (millimetres.float() / 1000).masked_fill(millimetres == 0, float("nan"))


@register("nyuv2", "geometry")
def nyuv2(root: Path) -> Dataset[GeometrySample]:
    """NYUv2 as ``{train,test}/{rgb,depth,normals}/NAME.png``.

    Depth is in millimetres, 16 bits, 0 where unknown. Normals are 8-bit RGB, 127.5 (n + 1), (0, 0, 0) or
    (128, 128, 128) where unknown, in camera coordinates with x right, y down and z forward.

    In the simple layout (``images``, ``train.txt``, ``test.txt``) depth is ``depth_mm/NAME.png``, and normals follow
    from it by plane fits, known up to 4 metres; pictures are cut to the part in which depth is judged.
    """
    if has_simple_layout(root):
        first, second = (named_files(root, name, "depth_mm") for name in ("train", "test"))
        return Dataset("nyuv2", Samples(first, _cut_sample), Samples(second, _cut_sample))
    train, test = (list_files(root / name / "rgb", "*.*", "NYUv2 pictures") for name in ("train", "test"))
    return Dataset("nyuv2", Samples(train, _nyuv2_sample), Samples(test, _nyuv2_sample))


def _nyuv2_sample(picture: Path) -> GeometrySample:
    split, name = picture.parent.parent, f"{picture.stem}.png"
    colours = read_map(split / "normals" / name, "a normal map in three channels")
    return GeometrySample(picture.stem, read_image(picture), _depth(split / "depth" / name), _decode_normals(colours))


def _cut_sample(files: tuple[Path, Path]) -> GeometrySample:
    picture, file = files
    image, depth = read_image(picture), _depth(file)
    check_size(depth, file, image, picture)
    scale = depth.shape[1] / WIDTH
    # Half a pixel: coordinates scale from the picture's border, not from the centre of its first pixel.
    focal = (scale * FOCAL[0], scale * FOCAL[1])
    centre = (scale * (CENTRE[0] + 0.5) - 0.5, scale * (CENTRE[1] + 0.5) - 0.5)
    normals = normals_by_plane_fit(depth, focal, centre, max(1, round(3 * scale)))
    normals = normals.masked_fill(~(depth <= RELIABLE), float("nan"))
    rows, columns = (slice(round(scale * first), round(scale * last)) for first, last in CROP)
    cut = (each[..., rows, columns] for each in (image, depth, normals))
    return GeometrySample(picture.stem, *cut)


def _decode_normals(colours: Tensor) -> Tensor:
    normals = colours.float() / 127.5 - 1
    unknown = (colours == 0).all(0) | (colours == 128).all(0)
    return F.normalize(normals, dim=0).masked_fill(unknown, float("nan"))


@register("navi", "geometry")
def navi(root: Path) -> Dataset[GeometrySample]:
    """NAVI v1: ``OBJECT/SCENE/{images,depth}`` with ``annotations.json``, depth 16-bit PNG in millimetres.

    Depth and normals are known on the object alone. Normals follow from depth and the focal length, as NAVI has none.
    An entry's ``split`` ("train" or "val"/"valid"/"test") decides its split.
    """
    splits: dict[str, list[tuple[Path, dict[str, Any]]]] = {"train": [], "val": []}
    for file in list_files(root, "*/*/annotations.json", "NAVI scenes"):
        try:
            entries = json.loads(expect_file(file, "annotations").read_text())
            for entry in entries:
                splits["train" if entry["split"] == "train" else "val"].append((file.parent, entry))
                entry["filename"], entry["camera"]["focal_length"]
        except (ValueError, KeyError, TypeError) as error:
            raise LoftUpError(
                f"{file} is not NAVI's: expected a list of entries with filename, split and camera.focal_length "
                f"({type(error).__name__}: {error})"
            ) from error
    return Dataset("navi", Samples(splits["train"], _navi_sample), Samples(splits["val"], _navi_sample))


def _navi_sample(entry: tuple[Path, dict[str, Any]]) -> GeometrySample:
    scene, fields = entry
    image = read_image(scene / "images" / fields["filename"])
    stem = Path(fields["filename"]).stem
    depth = _depth(scene / "depth" / f"{stem}.png")
    normals = normals_from_depth(depth, float(fields["camera"]["focal_length"]))
    return GeometrySample(f"{scene.parent.name}/{scene.name}/{stem}", image, depth, normals)


def normals_from_depth(depth: Tensor, focal: float) -> Tensor:
    """Surface normals (3, H, W) of a depth map (H, W), by the cross product of central differences of its points.

    Args:
        depth: in metres along the optical axis, NaN where unknown.
        focal: focal length in pixels; the principal point is the picture's centre.

    Returns:
        Unit vectors that face the camera (z negative), NaN where a neighbour's depth is unknown.
    """
    height, width = depth.shape
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    points = torch.stack([x * depth / focal, y * depth / focal, depth])
    padded = F.pad(points, (1, 1, 1, 1), value=float(np.nan))
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    normals = F.normalize(torch.linalg.cross(down, across, dim=0), dim=0)
    return normals.masked_fill(depth.isnan(), float("nan"))
