r"""Pictures of what upsampling makes of a vision transformer: principal components, likeness to a point, and segments.

    python benchmarks/recipes/vit_pictures.py photo.jpg --point 0.4 0.6 -o pictures/photo \
        --weights dinov2_vits14_imgfocus.safetensors --layer 10

For every photograph three sheets come: ``-components.jpg``, ``-likeness.jpg`` (cosine to the features at the point, in
shares of the height and width) and ``-segments.jpg`` (k-means, K clusters). Each has a panel for every upsampler:
bilinear, ``any``, and ``any`` on four shifted views. ``--blind SEED`` shuffles the panels and numbers them, and writes
which is which to ``-key.txt``: to judge before one knows.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from loftup import Backbone, LoftUp, load_backbone
from loftup.pictures import open_picture
from loftup.viz import pca_image

GAP = 6
WARM = ((0.0, (12, 7, 60)), (0.4, (140, 30, 110)), (0.7, (240, 110, 60)), (1.0, (255, 240, 170)))  # low to high


def maps_of(backbone: Backbone, up: LoftUp, image: Tensor) -> dict[str, Tensor]:
    """Features (C, H, W) of an image (1, 3, H, W), by the upsampler's name."""
    size = (image.shape[-2], image.shape[-1])
    low = backbone(image)
    finer = backbone.with_views(4)(image)
    return {
        "bilinear": F.interpolate(low, size, mode="bilinear", align_corners=False)[0],
        "any": up(low, image)[0],
        "any, four views": up(finer, image)[0],
    }


def coloured(values: Tensor) -> Tensor:
    """(H, W) in [0, 1] as (3, H, W) in [0, 1]."""
    result = torch.zeros(3, *values.shape)
    for (low, first), (high, second) in itertools.pairwise(WARM):
        share = ((values - low) / (high - low)).clamp(0, 1)
        inside = (values >= low) & (values <= high)
        for channel, (a, b) in enumerate(zip(first, second, strict=True)):
            result[channel][inside] = ((a + share * (b - a)) / 255)[inside]
    return result


def likeness(maps: dict[str, Tensor], point: tuple[float, float]) -> dict[str, Tensor]:
    """Cosines to the vector at a point, all in one range."""
    cosines = {}
    for name, features in maps.items():
        centred = features - features.mean((1, 2), keepdim=True)
        row, column = (int(share * side) for share, side in zip(point, features.shape[1:], strict=True))
        cosines[name] = F.cosine_similarity(centred, centred[:, row, column, None, None], dim=0)
    low = torch.stack([x.quantile(0.02) for x in cosines.values()]).min()
    return {name: coloured(((x - low) / (1 - low)).clamp(0, 1)) for name, x in cosines.items()}


def segments(maps: dict[str, Tensor], clusters: int, seed: int = 0) -> dict[str, Tensor]:
    """Clusters by k-means from the same start, found in the last map and used in all, in fixed colours."""
    torch.manual_seed(seed)
    units = {name: F.normalize(x - x.mean((1, 2), keepdim=True), dim=0).flatten(1).mT for name, x in maps.items()}
    learned = units[list(maps)[-1]]
    centres = learned[torch.randperm(len(learned))[:clusters]]
    for _ in range(30):
        nearest = (learned @ centres.mT).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, learned)
        centres = F.normalize(sums, dim=1)
    colours = pca_image(centres.mT[None, :, None])[0, :, 0]  # (3, K)
    size = next(iter(maps.values())).shape[1:]
    return {name: colours[:, (x @ centres.mT).argmax(1)].unflatten(1, size) for name, x in units.items()}


def to_picture(panel: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((panel * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy())


def sheet(photo: Image.Image, panels: dict[str, Image.Image], point: tuple[float, float] | None = None) -> Image.Image:
    """The photograph and the panels in a row, with captions; a ring marks the point."""
    photo = photo.copy()
    if point is not None:
        row, column = point[0] * photo.height, point[1] * photo.width
        ring = max(4.0, photo.height / 40)
        for radius, colour in ((ring, "black"), (ring - 2, "white")):
            ImageDraw.Draw(photo).ellipse(
                [column - radius, row - radius, column + radius, row + radius], outline=colour, width=3
            )
    every = {"image": photo, **panels}
    size = photo.height // 16
    result = Image.new("RGB", (len(every) * (photo.width + GAP) - GAP, photo.height + 2 * size), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(size)
    for index, (name, panel) in enumerate(every.items()):
        left = index * (photo.width + GAP)
        draw.text((left + photo.width // 2, size), name, fill="black", font=font, anchor="mm")
        result.paste(panel, (left, 2 * size))
    return result


def main(words: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photo", type=Path)
    add("-o", "--output", type=Path, required=True, metavar="STEM", help="path of the sheets without their endings")
    add("--point", type=float, nargs=2, default=(0.5, 0.5), metavar=("ROW", "COLUMN"), help="in shares of the sides")
    add("--clusters", type=int, default=7, metavar="K")
    add("--backbone", default="dinov2_vits14")
    add("--weights", type=Path, help="of the backbone; default: from the Hub")
    add("--layer", type=int, help="block of the backbone; default: its last")
    add("--upsampler", default="any", help="name or folder of weights (default: %(default)s)")
    add("--side", type=int, default=448, help="short side of the image in pixels (default: %(default)s)")
    add("--blind", type=int, metavar="SEED")
    given = parser.parse_args(words)
    backbone = load_backbone(given.backbone, weights=given.weights, layer=given.layer)
    photo = open_picture(given.photo)
    scale, patch = given.side / min(photo.size), backbone.patch_size
    height, width = (round(side * scale / patch) * patch for side in (photo.height, photo.width))
    image = backbone.preprocess(photo, size=(height, width))
    point = (given.point[0], given.point[1])
    with torch.inference_mode():
        maps = maps_of(backbone, LoftUp.from_pretrained(given.upsampler), image)
        parts = {
            "components": dict(zip(maps, pca_image(list(maps.values()), shared_range=True), strict=True)),
            "likeness": likeness(maps, point),
            "segments": segments(maps, given.clusters),
        }
    order = list(maps)
    if given.blind is not None:
        random.Random(given.blind).shuffle(order)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for part, panels in parts.items():
        named = {
            name if given.blind is None else str(number): to_picture(panels[name])
            for number, name in enumerate(order, 1)
        }
        shown = photo.resize((width, height), Image.Resampling.BICUBIC)
        made = sheet(shown, named, point if part == "likeness" else None)
        made.save(given.output.with_name(f"{given.output.name}-{part}.jpg"), quality=90)
    if given.blind is not None:
        lines = [f"{number} {name}\n" for number, name in enumerate(order, 1)]
        given.output.with_name(f"{given.output.name}-key.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
