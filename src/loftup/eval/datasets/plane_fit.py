"""Surface normals of a depth map by fitting planes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["normals_by_plane_fit"]

REACH = 3  # points of a window to each side of its centre
TOLERANCE = 0.05  # of the centre's inverse depth: points that differ by more lie on another surface
FEWEST = 12  # points of a plane


def normals_by_plane_fit(
    depth: Tensor, focal: tuple[float, float], centre: tuple[float, float], step: int = 3
) -> Tensor:
    """Surface normals (3, H, W) of a depth map (H, W), by least squares over the surroundings of every pixel.

    The inverse depth of a plane is affine in the pixel's coordinates, so that the fit is linear and exact for planes.
    Points are taken at 7 by 7 pixels around the centre, and left out where their depth tells of another surface.

    Args:
        depth: in metres along the optical axis, NaN where unknown.
        focal: focal lengths (across, down) in pixels.
        centre: principal point (across, down) in pixels, the first pixel's centre being 0.
        step: pixels between the points: the window is 6 steps and a pixel wide, 19 pixels by default.

    Returns:
        Unit vectors that face the camera (x right, y down, z forward, so z < 0), NaN where the depth is unknown or too
        few points lie on the surface.
    """
    height, width = depth.shape
    inverse = 1 / depth.float()
    margin = REACH * step
    padded = F.pad(inverse, (margin, margin, margin, margin), value=math.nan)
    offsets = range(-margin, margin + 1, step)
    zeros = torch.zeros_like(inverse)
    count, across, down, across2, both, down2 = (zeros.clone() for _ in range(6))
    rise, rise_across, rise_down = (zeros.clone() for _ in range(3))
    for dv in offsets:
        for du in offsets:
            there = padded[margin + dv : margin + dv + height, margin + du : margin + du + width]
            difference = there - inverse
            near = (difference.abs() <= TOLERANCE * inverse).float()
            difference = torch.where(near > 0, difference, zeros)
            count += near
            across += du * near
            down += dv * near
            across2 += du * du * near
            both += du * dv * near
            down2 += dv * dv * near
            rise += difference
            rise_across += du * difference
            rise_down += dv * difference
    # Normal equations of an affine function, its constant eliminated.
    uu, uv, vv = across2 - across**2 / count, both - across * down / count, down2 - down**2 / count
    ru, rv = rise_across - rise * across / count, rise_down - rise * down / count
    determinant = uu * vv - uv**2
    slope_u, slope_v = (vv * ru - uv * rv) / determinant, (uu * rv - uv * ru) / determinant
    middle = inverse + (rise - slope_u * across - slope_v * down) / count
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    z = middle - (columns - centre[0]) * slope_u - (rows - centre[1]) * slope_v
    normals = -F.normalize(torch.stack([focal[0] * slope_u, focal[1] * slope_v, z]), dim=0)
    unknown = (count < FEWEST) | (determinant < 1e-9 * step**4) | depth.isnan()
    return normals.masked_fill(unknown, math.nan)
