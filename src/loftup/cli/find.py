"""The command ``loftup find``: pictures ranked by where a text describes them best, and the place shown."""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FAILURES, LoftUpError, one_line, translate
from ..files import MADE_BY, alone_in, made_here, refuse_others, stamp, write_atomically
from ..progress import tell, track
from ..version import __version__
from ..weights.catalogue import ANY
from ..weights.names import resolve
from .features import expand
from .options import DEVICE, LONGEST, place, positive, views, word

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_parser", "best_region"]

RESULTS, TABLE = "results.json", "results.csv"
HEADER = ("query", "rank", "image", "score", "left", "top", "right", "bottom")
SHARE = 0.01  # of the pixels, whose mean is a picture's score
EVERY = 30.0  # seconds after which scores are written
SIDE = 1024  # pixels of the longer side of an overlay, at most


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "find",
        help="find pictures by a text, and where in them",
        description="Ranks pictures by the likeness of a CLIP's dense, upsampled features to a text: the score is the "
        f"mean cosine of the {SHARE:.0%} of pixels that are most alike. Writes "
        f"{TABLE} and {RESULTS} with scores and the box around the best place, and the best pictures with the likeness "
        "over them. Goes on where a run was cut off. Needs the extra loftup[text].",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("text", type=word, metavar="TEXT", help="what to look for; synonyms separated by commas")
    add("images", nargs="+", type=place, metavar="IMAGE", help="image files, or folders with all below")
    add("-o", "--output", type=place, required=True, metavar="DIR", help=f"for {TABLE}, {RESULTS} and the pictures")
    add("--also", action="append", default=[], type=word, metavar="TEXT", help="another text, repeatable")
    other = "what it is not, repeatable: the likeness to the nearest of these is subtracted"
    add("--not", dest="others", action="append", default=[], type=word, metavar="TEXT", help=other)
    add("--top", type=positive, default=10, metavar="N", help="pictures to show of each text (default: %(default)s)")
    clip = "of open_clip, MODEL/PRETRAINED, where PRETRAINED may be a local file (default: %(default)s)"
    add("--clip", type=word, default="ViT-B-16/openai", metavar="NAME", help=clip)
    add("--weights", type=word, default=ANY, metavar="NAME|PATH", help="LoftUp weights (default: %(default)s)")
    add("--views", type=views, default=1, metavar="N", help="shifted views of each picture: 1, 4, 9 or 16 (default: 1)")
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help=f"of the maps; default: {LONGEST}")
    short = "short side of the CLIP's input (default: %(default)s)"
    add("--input", type=positive, default=336, metavar="N", help=short)
    add("--device", type=word, help=DEVICE)
    add("--overwrite", action="store_true", help="look at all pictures anew")


def _run(arguments: argparse.Namespace) -> int:
    from .models import choose_device

    choose_device(arguments)
    images = list(expand(arguments.images))
    texts = list(dict.fromkeys([arguments.text, *arguments.also]))
    results = arguments.output / RESULTS
    refuse_others([results, arguments.output / TABLE])
    settings = _settings(arguments, texts)
    records = {} if arguments.overwrite else _before(results, settings)
    waiting = [image for image in images if not _is_scored(records.get(str(image)), image)]
    if skipped := len(images) - len(waiting):
        print(f"{skipped} of {len(images)} images are scored already", file=sys.stderr)
    with alone_in(arguments.output, _folders(texts).values()):
        likeness = _Likeness(arguments, texts)
        failed = _score(arguments, texts, likeness, waiting, records, settings)
        scored = {image: records[str(image)] for image in images if str(image) in records}
        if not scored:
            raise LoftUpError(f"none of the {len(images)} pictures can be used, such as {images[0]}")
        shown = _show(arguments, texts, likeness, scored)
        write_atomically(arguments.output / TABLE, _table(texts, scored))
    for text in texts:
        best = max(scored, key=lambda image: scored[image]["scores"][texts.index(text)])
        print(f"{text!r}: best {best}, {scored[best]['scores'][texts.index(text)]:.3f}")
    print(f"ranked {len(scored)} of {len(images)} pictures, {shown} shown; wrote {arguments.output}", file=sys.stderr)
    return 1 if failed else 0


class _Likeness:
    """Maps (Q, H, W) of how alike the pixels of a picture are to texts."""

    def __init__(self, arguments: argparse.Namespace, texts: Sequence[str]) -> None:
        from ..eval.text import OpenClip, embed, templates
        from ..model import LoftUp
        from ..upsampled import Upsampled

        self.arguments = arguments
        self.up = LoftUp.from_pretrained(arguments.weights, device=arguments.device)
        clip = OpenClip(arguments.clip, arguments.device)
        self.backbone = Upsampled(clip.backbone, self.up, views=arguments.views).backbone
        wanted = [_without_article(text) for text in (*texts, *arguments.others)]
        vectors = embed(clip, wanted, templates()).to(arguments.device)
        self.queries, self.others = vectors[: len(texts)], vectors[len(texts) :]

    def __call__(self, picture: Any) -> "Tensor":
        import torch

        from .models import picture_inputs

        features, large, size = picture_inputs(self.arguments, self.backbone, picture)
        with torch.inference_mode():
            return self.up(features, large, size=size, head=self._head)[0].float().cpu()

    def _head(self, vectors: "Tensor") -> "Tensor":
        import torch
        import torch.nn.functional as F

        unit = F.normalize(vectors.float(), dim=1)
        alike = torch.einsum("bcnm,kc->bknm", unit, self.queries)
        if len(self.others):
            alike = alike - torch.einsum("bcnm,kc->bknm", unit, self.others).amax(1, keepdim=True)
        return alike


def _score(
    arguments: argparse.Namespace,
    texts: Sequence[str],
    likeness: Any,
    images: Sequence[Path],
    records: dict[str, Any],
    settings: Mapping[str, Any],
) -> int:
    """Score pictures into the records, which are kept in a file; returns how many failed."""
    from ..pictures import open_picture

    def keep() -> None:
        content = {"made_by": MADE_BY, "settings": settings, "pictures": records}
        write_atomically(arguments.output / RESULTS, json.dumps(content, indent=1).encode("utf-8", "surrogateescape"))

    failed, written = 0, time.monotonic()
    try:
        for image in track(images, "find", len(images), unit="images"):
            try:
                source, picture = stamp(image), open_picture(image)
                pairs = [best_region(each) for each in likeness(picture)]
            except (*FAILURES, OverflowError) as error:
                failed += 1
                records.pop(str(image), None)
                tell(f"loftup find: {image}: {one_line(error)}")
                continue
            boxes = [_scaled(box, shape, picture.size) for _, box, shape in pairs]
            records[str(image)] = {"image_file": source, "scores": [pair[0] for pair in pairs], "boxes": boxes}
            if time.monotonic() - written > EVERY:
                keep()
                written = time.monotonic()
    finally:
        if records:
            keep()
    return failed


def best_region(alike: "Tensor") -> tuple[float, tuple[int, int, int, int], tuple[int, int]]:
    """Score a map, and find its best place.

    The box holds the connected pixels around the brightest that are above the middle between it and the median.

    Args:
        alike: (H, W), likeness of each pixel.

    Returns:
        The mean of the SHARE of pixels that are most alike; (left, top, right, bottom), the last two excluded; (H, W).

    Raises:
        LoftUpError: scipy is missing (extra ``text``).
    """
    with translate(ImportError, 'boxes need scipy: pip install "loftup[text]"'):
        from scipy import ndimage

    flat = alike.flatten()
    score = float(flat.topk(max(1, round(SHARE * len(flat)))).values.mean())
    middle = (flat.max() + flat.median()) / 2
    parts, _ = ndimage.label((alike >= middle).numpy())
    rows, columns = ndimage.find_objects(parts)[parts.flat[int(flat.argmax())] - 1]
    return score, (columns.start, rows.start, columns.stop, rows.stop), (alike.shape[0], alike.shape[1])


def _scaled(box: Sequence[int], shape: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """A box of a map (H, W) in the pixels of a picture (W, H)."""
    across, down = size[0] / shape[1], size[1] / shape[0]
    return [round(value * scale) for value, scale in zip(box, (across, down, across, down), strict=True)]


def _show(
    arguments: argparse.Namespace, texts: Sequence[str], likeness: Any, scored: Mapping[Path, Mapping[str, Any]]
) -> int:
    """Write the best pictures of each text with the likeness over them, and remove those of a run before."""
    from ..pictures import encode, open_picture

    count = 0
    for index, (text, folder) in enumerate(_folders(texts).items()):
        best = _ranked(scored, index)[: arguments.top]
        names = [f"{rank:03d}_{image.name}.jpg" for rank, image in enumerate(best, 1)]
        place = arguments.output / folder
        refuse_others(place / name for name in names)
        for old in place.glob("[0-9][0-9][0-9]*_*.jpg"):
            if old.name not in names and made_here(old):
                old.unlink()
        for name, image in zip(names, track(best, f"show {text}", len(best), unit="images"), strict=True):
            try:
                picture = open_picture(image)
                sheet = _overlay(picture, likeness(picture)[index], scored[image]["boxes"][index])
                write_atomically(place / name, encode(sheet, "JPEG", quality=90))
                count += 1
            except (*FAILURES, OverflowError) as error:
                tell(f"loftup find: {image}: {one_line(error)}")
    return count


def _overlay(picture: Any, alike: "Tensor", box: Sequence[int]) -> Any:
    """The picture in grey, orange where it is alike, its best place in a frame."""
    from PIL import ImageDraw

    from ..viz import overlay

    scale = min(1.0, SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    low = alike.median()
    sheet = overlay(picture.resize((width, height)), ((alike - low) / (alike.max() - low).clamp(min=1e-6)).clamp(0, 1))
    draw, line = ImageDraw.Draw(sheet), max(1, max(width, height) // 400)
    left, top, right, bottom = (round(value * scale) for value in box)
    right, bottom = max(left, right - 1), max(top, bottom - 1)
    draw.rectangle([left - line, top - line, right + line, bottom + line], outline="black", width=3 * line)
    draw.rectangle([left, top, right, bottom], outline="white", width=line)
    return sheet


def _ranked(scored: Mapping[Path, Mapping[str, Any]], index: int) -> list[Path]:
    return sorted(scored, key=lambda image: -scored[image]["scores"][index])


def _table(texts: Sequence[str], scored: Mapping[Path, Mapping[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADER)
    for index, text in enumerate(texts):
        for rank, image in enumerate(_ranked(scored, index), 1):
            record = scored[image]
            writer.writerow([text, rank, image, f"{record['scores'][index]:.5f}", *record["boxes"][index]])
    return stream.getvalue().encode("utf-8", "surrogateescape")


def _folders(texts: Sequence[str]) -> dict[str, str]:
    """A folder's name for each text, none twice."""
    names: dict[str, str] = {}
    for index, text in enumerate(texts, 1):
        plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60] or f"text_{index}"
        names[text] = plain if plain not in names.values() else f"{plain}_{index}"
    return names


def _without_article(text: str) -> str:
    """A text as sentences have it that bring their own article."""
    return ", ".join(re.sub(r"^(an?|the)\s+(?=\S)", "", part.strip(), flags=re.I) for part in text.split(","))


def _settings(arguments: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """The settings that decide scores and boxes."""
    clip, _, file = arguments.clip.partition("/")
    return {
        "texts": list(texts),
        "not": list(arguments.others),
        "clip": f"{clip}/{file} {stamp(Path(file))}" if os.path.isfile(file) else arguments.clip,
        "weights": resolve(arguments.weights).identity(),
        "views": arguments.views,
        "input": arguments.input,
        "size": arguments.size or "image",
        "loftup_version": __version__,
    }


def _before(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The records of a run before; ValueError where they are of other settings."""
    if not file.is_file():
        return {}
    with translate((OSError, ValueError, KeyError), f"{file} is damaged; remove it, or give another folder"):
        content = json.loads(file.read_text("utf-8", "surrogateescape"))
        before, records = content["settings"], dict(content["pictures"])
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{file} was written with other settings ({name} {before.get(name)!r}, now {value!r}); pass "
                "--overwrite or another folder"
            )
    return records


def _is_scored(record: Any, image: Path) -> bool:
    with contextlib.suppress(OSError):
        return record is not None and record["image_file"] == stamp(image)
    return False
