"""A grid of pictures: image, truth, and what was made of the features of each method."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..pictures import require_pillow

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["figure"]

WIDEST = 240  # pixels of a picture
CAPTION, GAP = 22, 4


def figure(folder: Path, methods: Mapping[str, str]) -> "Image.Image | None":
    """Draw rows of pictures with captions.

    Args:
        folder: of ``NN_image.png``, ``NN_truth.png`` and ``NN_METHOD.png`` for every row NN.
        methods: caption to METHOD.

    Returns:
        The grid; None where there are no pictures.
    """
    pil = require_pillow()
    from PIL import ImageDraw, ImageFont

    columns = {"image": "image", "truth": "truth", **methods}
    files = sorted(folder.glob("[0-9][0-9]_image.png"))
    if not files:
        return None
    rows = []
    for file in files:
        paths = [folder / f"{file.name[:2]}_{name}.png" for name in columns.values()]
        rows.append([_small(pil.open(path).convert("RGB")) if path.is_file() else None for path in paths])
    width = max(picture.width for row in rows for picture in row if picture)
    heights = [max(picture.height for picture in row if picture) for row in rows]
    across = len(columns) * (width + GAP) + GAP
    grid = pil.new("RGB", (across, CAPTION + sum(heights) + GAP * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(13)
    for column, caption in enumerate(columns):
        draw.text((GAP + column * (width + GAP), 3), caption, fill="black", font=font)
    top = CAPTION
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            if picture:
                grid.paste(picture, (GAP + column * (width + GAP), top))
        top += height + GAP
    return grid  # type: ignore[no-any-return]


def _small(picture: "Image.Image") -> "Image.Image":
    if picture.width <= WIDEST:
        return picture
    return picture.resize((WIDEST, max(1, round(picture.height * WIDEST / picture.width))))
