"""Pictures made of tensors, and lines between the points of two of them."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pictures import require_pillow, to_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["as_picture", "matches", "to_pil"]

RIGHT, WRONG = (70, 180, 255), (230, 95, 0)  # blue and orange, which colour-blind people tell apart
FINER = 2  # times as large as the result lines are drawn, so that they are smooth


def as_picture(image: Any) -> "Image.Image":
    """A PIL image upright and in RGB, or one made of a tensor (3, H, W) or (1, 3, H, W) of any scaling.

    Raises:
        TypeError: it is neither.
        ValueError: the tensor has another shape.
    """
    pil = require_pillow()
    if isinstance(image, pil.Image):
        return to_rgb(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a PIL image or a tensor (3, H, W), got {type(image).__name__}")
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or image.numel() == 0:
        raise ValueError(f"image must be (3, H, W) or (1, 3, H, W), got {tuple(image.shape)}")
    if image.ndim == 4 and len(image) != 1:
        raise ValueError(f"a picture shows one image, got a batch of {len(image)}; choose one: image[0]")
    return to_pil(image)


def to_pil(image: Tensor, scale: bool = True) -> "Image.Image":
    """A tensor (3, H, W) or (1, 3, H, W) as a picture, from [0, 1] or, with ``scale``, from its own range."""
    image = image.detach().cpu().float()
    image = image[0] if image.ndim == 4 else image
    if scale:
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    array = (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    return require_pillow().fromarray(array)  # type: ignore[no-any-return]


def matches(
    first: "Image.Image | Tensor",
    second: "Image.Image | Tensor",
    points: Tensor | Sequence[Sequence[float]],
    targets: Tensor | Sequence[Sequence[float]],
    *,
    correct: Tensor | Sequence[bool] | None = None,
    stacked: bool = False,
    height: int | None = None,
) -> "Image.Image":
    """Draw two images side by side with lines between points of the one and of the other.

    Args:
        first: PIL image, or a tensor (3, H, W) or (1, 3, H, W) of any scaling (shown from its minimum to its maximum).
        second: the same; it is brought to the height of the first, or to its width where they are stacked.
        points: (N, 2), (x, y) in pixels of ``first``, centres at whole numbers.
        targets: (N, 2), the same in ``second``.
        correct: (N,), draws right ones in blue with a disc and wrong ones in orange with a cross; None gives lines
            colours by the place of their points.
        stacked: put the second image below the first.
        height: of the first image in pixels; None means its own.

    Returns:
        A PIL image.

    Raises:
        LoftUpError: Pillow is missing (extra ``viz``).
        ValueError: points and targets are not (N, 2), or ``correct`` not (N,), of the same N; or more than one image in
            a batch.
        TypeError: an image is neither a PIL image nor a tensor.
    """
    pil = require_pillow()
    from PIL import ImageDraw

    starts, ends = (torch.as_tensor(each).detach().cpu().double() for each in (points, targets))
    starts, ends = (each.reshape(0, 2) if each.shape == (0,) else each for each in (starts, ends))
    right = None if correct is None else torch.as_tensor(correct).cpu().bool()
    if starts.ndim != 2 or starts.shape[1] != 2 or ends.shape != starts.shape:
        raise ValueError(f"points and targets must be (N, 2) both, got {tuple(starts.shape)} and {tuple(ends.shape)}")
    if right is not None and right.shape != starts.shape[:1]:
        raise ValueError(f"correct must be ({len(starts)},), one for each point, got {tuple(right.shape)}")
    left, other = as_picture(first), as_picture(second)
    scale = (height or left.height) / left.height
    joined = left.width / other.width if stacked else left.height / other.height
    gap = max(2, round(scale * left.height / 100))
    panels, scales = [], (scale, scale * joined)
    for picture, factor in zip((left, other), scales, strict=True):
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        panels.append(picture.resize(size, pil.Resampling.BICUBIC))
    offset = (0, panels[0].height + gap) if stacked else (panels[0].width + gap, 0)
    sheet = pil.new("RGB", (offset[0] + panels[1].width, offset[1] + panels[1].height), "white")
    for panel, corner in zip(panels, ((0, 0), offset), strict=True):
        sheet.paste(panel, corner)
    fine = sheet.resize((FINER * sheet.width, FINER * sheet.height), pil.Resampling.BICUBIC)
    draw, line = ImageDraw.Draw(fine), max(FINER, round(FINER * panels[0].height / 220))
    places = FINER * (starts + 0.5) * scales[0], FINER * ((ends + 0.5) * scales[1] + torch.tensor(offset))
    colours = [_place_colour(x / left.width, y / left.height) for x, y in starts.tolist()]
    if right is not None:
        colours = [RIGHT if good else WRONG for good in right.tolist()]
    lines = list(zip(*(place.tolist() for place in places), colours, strict=True))
    for start, end, colour in lines:
        draw.line([*start, *end], fill=colour, width=line)
    for number, (start, end, colour) in enumerate(lines):
        _mark(draw, start, 2 * line, colour)
        _mark(draw, end, 2 * line, colour, cross=right is not None and not right[number])
    return fine.resize(sheet.size, pil.Resampling.BOX)  # type: ignore[no-any-return]


def _place_colour(x: float, y: float) -> tuple[int, ...]:
    """Hue by the column of a point and lightness by its row, both in [0, 1]."""
    channels = colorsys.hls_to_rgb(0.83 * min(max(x, 0.0), 1.0), 0.45 + 0.25 * min(max(y, 0.0), 1.0), 0.95)
    return tuple(round(255 * channel) for channel in channels)


def _mark(draw: Any, centre: Sequence[float], radius: int, colour: tuple[int, ...], cross: bool = False) -> None:
    """A disc, or a cross, with a white rim."""
    x, y = centre
    if not cross:
        rim = max(1, radius // 3)
        draw.ellipse([x - radius - rim, y - radius - rim, x + radius + rim, y + radius + rim], fill="white")
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
        return
    reach = 1.3 * radius
    for width, paint in ((radius + 2, "white"), (max(1, radius // 2), colour)):
        for slope in (1, -1):
            draw.line([x - reach, y - slope * reach, x + reach, y + slope * reach], fill=paint, width=width)
