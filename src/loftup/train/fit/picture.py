"""Held-out pictures before and after a fit, side by side."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...model import LoftUp
from ...viz import compare
from .criteria import HeldOut

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["comparison"]

ROWS = 4


@torch.no_grad()
def comparison(held_out: HeldOut, start: LoftUp, fitted: LoftUp, gained: bool) -> "Image.Image":
    """Draw pictures to report by: features, bilinear interpolation, ``any`` and, where it gained, what was fitted.

    Colours are principal components, the same for the maps of a row.
    """
    from PIL import Image

    sheets = []
    for example in held_out.reporting[:ROWS]:
        image, cells = example.case.image, example.cells
        maps = {
            "features": cells,
            "bilinear": F.interpolate(cells, image.shape[2:], mode="bilinear", align_corners=False),
            "any": start(cells, image),
        }
        if gained:
            maps["fitted"] = fitted(cells, image)
        sheets.append(compare(image, maps, shared_range=True))
    grid = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    for index, sheet in enumerate(sheets):
        grid.paste(sheet, (0, sum(above.height for above in sheets[:index])))
    return grid
