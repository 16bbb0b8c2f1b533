"""The command ``loftup segment``: pictures cut into clusters of their upsampled features, without labels."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FAILURES, LoftUpError, one_line
from ..files import alone_in, refuse_others, stamp, write_atomically
from ..progress import readable, tell, track
from .demo import package_or_named
from .features import SAMPLES, expand, model_settings, refuse_changed, targets_in
from .options import add_model_options, place, positive

if TYPE_CHECKING:
    from torch import Tensor

    from ..backbones import Backbone
    from ..clusters import Clusters
    from ..model import LoftUp

__all__ = ["add_parser"]

CENTRES = "clusters.safetensors"
PIXELS = 16_384  # of a picture, that a fit looks at
IN_ALL = 65_536
FEWEST = 256
KEY = "loftup_segment"  # of the settings in a label map


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "segment",
        help="cut pictures into clusters of their features",
        description="Clusters the upsampled features of all pictures together, so that a cluster means the same in all "
        "of them, and writes NAME.png for each: 8 bits a pixel, the cluster's number, with a table of colours. Goes on "
        f"where a run was cut off; the centres are kept in {CENTRES}. Needs the extra loftup[segment].",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("images", nargs="+", type=place, metavar="IMAGE", help="image files, or folders with all below")
    add("-o", "--output", type=place, required=True, metavar="DIR", help="for NAME.png, in the same subfolders")
    add("-k", "--clusters", type=positive, default=8, metavar="K", help="how many, up to 256 (default: %(default)s)")
    add("--method", choices=("kmeans", "gaussian"), default="kmeans", help="default: %(default)s")
    add("--each", action="store_true", help="clusters of their own for each picture")
    add("--overlay", action="store_true", help="write NAME.overlay.jpg too: the colours over the picture")
    fitted = "pictures that shared clusters are fitted to, evenly spread (default: %(default)s)"
    add("--fit", type=positive, default=64, metavar="N", help=fitted)
    add("--seed", type=int, default=0, help="of the fit (default: %(default)s)")
    add_model_options(parser, backbone=None, size="each picture's own")
    add(
        "--longest",
        type=positive,
        metavar="N",
        help="longer side of the label maps, at most; faster for large pictures",
    )
    add("--overwrite", action="store_true", help="fit anew, and write files of loftup's anew that are there already")


def _run(arguments: argparse.Namespace) -> int:
    from .models import check_backbone, load_models

    if arguments.clusters > 256:
        raise ValueError(f"--clusters must be at most 256, as label maps have 8 bits, got {arguments.clusters}")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {arguments.seed}")
    arguments.weights = package_or_named(arguments)
    check_backbone(arguments)
    images = expand(arguments.images)
    suffixes = (".png", *((".overlay.jpg",) if arguments.overlay else ()))
    suffixes += (".clusters.safetensors",) if arguments.each else ()
    tables = {suffix: targets_in(arguments.output, images, suffix) for suffix in suffixes}
    targets = {image: {suffix: table[image] for suffix, table in tables.items()} for image in images}
    kept = arguments.output / CENTRES
    refuse_others([kept, *(path for each in targets.values() for path in each.values())])
    settings = _settings(arguments)
    clusters = None if arguments.each or arguments.overwrite else _kept(kept, settings)
    mark = {**settings, "clusters": "own" if arguments.each else _digest(kept) if clusters else "not there"}
    waiting = [image for image in images if arguments.overwrite or not _finished(targets[image], image, mark)]
    if skipped := len(images) - len(waiting):
        print(f"{skipped} of {len(images)} images are finished already", file=sys.stderr)
    if not waiting:
        return 0
    subfolders = {str(each[".png"].parent.relative_to(arguments.output)) for each in targets.values()}
    failed = 0
    with alone_in(arguments.output, subfolders - {"."}):
        backbone, up = load_models(arguments)
        print(_estimate(arguments, waiting), file=sys.stderr)
        if clusters is None and not arguments.each:
            clusters = _fit(arguments, backbone, up, list(images))
            clusters.save(kept, **settings)
            mark["clusters"] = _digest(kept)
        for image in track(waiting, "segment", len(waiting), unit="images"):
            try:
                _segment(arguments, backbone, up, image, clusters, targets[image], mark)
            except (*FAILURES, OverflowError) as error:
                failed += 1
                tell(f"loftup segment: {image}: {one_line(error)}")
    print(f"wrote {len(waiting) - failed} of {len(waiting)} label maps to {arguments.output}", file=sys.stderr)
    return 1 if failed else 0


def _segment(
    arguments: argparse.Namespace,
    backbone: "Backbone",
    up: "LoftUp",
    image: Path,
    clusters: "Clusters | None",
    targets: dict[str, Path],
    mark: dict[str, str],
) -> None:
    """Write a picture's files, the label map last, which says that they are there."""
    import torch
    from PIL import Image, PngImagePlugin

    from ..clusters import Clusters
    from ..eval.colour import palette
    from ..pictures import encode, open_picture
    from .models import picture_inputs

    source = stamp(image)
    picture = open_picture(image)
    features, large, _ = picture_inputs(arguments, backbone, picture)
    if clusters is None:
        dense = _map(arguments, up, features, large, PIXELS)
        clusters = Clusters.fit(dense, arguments.clusters, method=arguments.method, seed=arguments.seed)
        clusters.save(targets[".clusters.safetensors"], **mark)
    with torch.inference_mode():
        labels = up(features, large, size=_size(arguments, *large.shape[-2:]), head=clusters)[0]
    shown = Image.fromarray(labels.cpu().numpy())
    shown.putpalette([value for colour in palette(256) for value in colour])
    if ".overlay.jpg" in targets:
        blended = Image.blend(picture.resize(shown.size, Image.Resampling.BICUBIC), shown.convert("RGB"), 0.5)
        write_atomically(targets[".overlay.jpg"], encode(blended, "JPEG", quality=90))
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps({**mark, "image_file": source}))
    write_atomically(targets[".png"], encode(shown, "PNG", pnginfo=info))


def _fit(arguments: argparse.Namespace, backbone: "Backbone", up: "LoftUp", images: Sequence[Path]) -> "Clusters":
    """Clusters of pictures that stand for all; LoftUpError where none of them can be read."""
    from ..clusters import Clusters
    from ..pictures import open_picture
    from .models import picture_inputs

    some = images[:: -(-len(images) // arguments.fit)]
    count = max(FEWEST, min(PIXELS, IN_ALL // len(some)))
    maps = []
    for image in track(some, "fit", len(some), unit="images"):
        with contextlib.suppress(OSError, ValueError):  # it fails later, by its name
            maps.append(_map(arguments, up, *picture_inputs(arguments, backbone, open_picture(image))[:2], count))
    if not maps:
        raise LoftUpError(f"none of the {len(some)} pictures to fit clusters to can be used, such as {some[0]}")
    return Clusters.fit(maps, arguments.clusters, method=arguments.method, seed=arguments.seed)


def _map(arguments: argparse.Namespace, up: "LoftUp", features: "Tensor", image: "Tensor", count: int) -> "Tensor":
    """Upsampled features (C, n, m) of a picture, some ``count`` of them."""
    import torch

    height, width = _size(arguments, *image.shape[-2:])
    scale = min(1.0, (count / (height * width)) ** 0.5)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    with torch.inference_mode():
        return up(features, image, size=size)[0].float().cpu()


def _size(arguments: argparse.Namespace, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the label map of a picture."""
    if arguments.size:
        return arguments.size[0], arguments.size[1]
    scale = min(1.0, (arguments.longest or math.inf) / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that decide the content of label maps."""
    own = {"k": arguments.clusters, "method": arguments.method, "seed": arguments.seed, "longest": arguments.longest}
    own |= {} if arguments.each else {"fit": arguments.fit}
    return {**model_settings(arguments), **{name: str(value) for name, value in own.items()}}


def _kept(file: Path, settings: dict[str, str]) -> "Clusters | None":
    """The clusters of a run before; None where there are none, ValueError where they are of other settings."""
    if not file.is_file():
        return None
    from safetensors import safe_open

    from ..clusters import Clusters

    clusters = Clusters.load(file)
    with safe_open(file, framework="pt") as handle:
        refuse_changed(file, handle.metadata() or {}, settings)
    return clusters


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _finished(targets: dict[str, Path], image: Path, mark: dict[str, str]) -> bool:
    """Tell whether a picture's files are there, with these settings; ValueError if they are there with others."""
    from PIL import Image

    target = targets[".png"]
    if not (os.path.exists(target) and os.path.exists(image)):
        return False
    try:
        with Image.open(target) as picture:
            before = json.loads(getattr(picture, "text", {})[KEY])
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{target} exists but is no label map of this command; remove it") from error
    refuse_changed(target, before, {**mark, "image_file": stamp(image)})
    return all(map(os.path.exists, targets.values()))


def _estimate(arguments: argparse.Namespace, images: Sequence[Path]) -> str:
    """Say how much there is to do, by up to SAMPLES pictures, evenly spread."""
    from ..pictures import picture_size

    pixels = []
    for image in images[:: -(-len(images) // SAMPLES)]:
        with contextlib.suppress(OSError):  # it fails later, by its name
            height, width = _size(arguments, *picture_size(image))
            pixels.append(height * width)
    total = sum(pixels) / max(1, len(pixels)) * len(images)
    maps = f"{len(images)} label maps of {arguments.clusters} clusters"
    return f"{maps}, {total / 1e6:.1f} megapixels: at most {readable(total)}"
