"""The command ``loftup features``: features of many pictures, written so that a second run goes on."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FAILURES, LoftUpError, one_line
from ..files import alone_in, refuse_others, stamp, write_atomically
from ..pictures import IMAGE_SUFFIXES
from ..progress import readable, tell, track
from ..version import __version__
from ..weights.catalogue import TINY_BACKBONES
from ..weights.names import in_package, resolve
from . import shards
from .options import add_model_options, word

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..model import LoftUp

__all__ = ["add_parser", "expand", "model_settings", "refuse_changed", "targets_in"]

MOST = 10**10  # bytes that are written without asking
SAMPLES = 1000  # pictures whose sizes stand for all


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    said = "write features of images: upsampled ones as safetensors, or shards of any number of pictures"
    parser = commands.add_parser("features", help=said)
    parser.set_defaults(run=_run)
    sources = "image files, or folders with all below; for shards also .tar, .parquet and URLs"
    parser.add_argument("images", nargs="+", type=word, metavar="IMAGE", help=sources)
    add_model_options(parser)
    add = parser.add_argument
    where = "for NAME.safetensors, in the same subfolders; or for shards, then also a URL"
    add("-o", "--output", type=word, metavar="DIR", help=where)
    add("--overwrite", action="store_true", help="write files of loftup's anew that are there already")
    add(
        "--yes",
        action="store_true",
        help=f"write more than {MOST / 1e9:.0f} GB, of shards more than 1 TB, without asking",
    )
    shards.add_options(parser)


def _run(arguments: argparse.Namespace) -> int:
    if shards.wanted(arguments):
        return shards.run(arguments)
    if arguments.output is None:
        raise ValueError("-o is missing: the folder for the features")
    arguments.images, arguments.output = list(map(Path, arguments.images)), Path(arguments.output)
    from .models import check_backbone, load_models

    check_backbone(arguments)
    images = expand(arguments.images)
    targets = targets_in(arguments.output, images, ".safetensors")
    settings = model_settings(arguments)
    refuse_others(targets.values())
    waiting = [image for image in images if arguments.overwrite or not _finished(targets[image], image, settings)]
    if skipped := len(images) - len(waiting):
        print(f"{skipped} of {len(images)} images are finished already", file=sys.stderr)
    if not waiting:
        return 0
    failed = 0
    subfolders = {str(target.parent.relative_to(arguments.output)) for target in targets.values()}
    with alone_in(arguments.output, subfolders - {"."}):
        backbone, up = load_models(arguments)
        if not _agreed(arguments, backbone.channels, waiting, [targets[image] for image in waiting]):
            return 1
        for image in track(waiting, arguments.backbone, len(waiting), unit="images"):
            try:
                write_atomically(targets[image], _features(arguments, backbone, up, image, settings))
            except (*FAILURES, OverflowError) as error:
                failed += 1
                tell(f"loftup features: {image}: {one_line(error)}")
    print(f"wrote {len(waiting) - failed} of {len(waiting)} files to {arguments.output}", file=sys.stderr)
    return 1 if failed else 0


def _features(
    arguments: argparse.Namespace, backbone: "Backbone", up: "LoftUp", image: Path, settings: dict[str, str]
) -> bytes:
    """The content of a features file."""
    import torch
    from safetensors.torch import save

    from ..pictures import open_picture
    from .models import upsample_picture

    name = os.fsencode(image.name).decode("utf-8", "backslashreplace")  # which metadata can hold
    source = {"image": name, "image_file": stamp(image)}
    _, high = upsample_picture(arguments, backbone, up, open_picture(image))
    half = high[0].to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(f"features reach {high.abs().max():.3g}, beyond what float16 holds")
    metadata = {**settings, **source, "size": f"{half.shape[-2]}x{half.shape[-1]}"}
    return save({"features": half.cpu().contiguous()}, metadata=metadata)


def _agreed(arguments: argparse.Namespace, channels: int, images: Sequence[Path], targets: Sequence[Path]) -> bool:
    """Say how much the files will hold, and ask whether to write them if that is much and --yes is not given.

    Raises:
        LoftUpError: it is much, and there is nobody to ask.
    """
    need = _bytes(arguments, channels, images)
    replaced = sum(target.stat().st_size for target in targets if os.path.exists(target)) if arguments.overwrite else 0
    free = shutil.disk_usage(arguments.output).free + replaced
    text = f"{len(images)} files of {channels} channels in float16: about {readable(need)}"
    if need >= free:
        text += f", and {readable(free)} are free"
    if arguments.yes or need <= min(MOST, free - 1):
        print(text, file=sys.stderr)
        return True
    if not sys.stdin.isatty():
        raise LoftUpError(f"{text}; give a smaller --size, or --yes to write them all the same")
    print(f"{text}. Write them? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _bytes(arguments: argparse.Namespace, channels: int, images: Sequence[Path]) -> int:
    """The size of all files together, estimated by up to SAMPLES pictures, evenly spread."""
    from ..pictures import picture_size
    from .models import result_size

    step = max(1, -(-len(images) // SAMPLES))
    pixels = []
    for image in images[::step]:
        with contextlib.suppress(OSError):  # it fails later, by its name
            height, width = result_size(arguments, *picture_size(image))
            pixels.append(height * width)
    return round(2 * channels * sum(pixels) / max(1, len(pixels)) * len(images))


def expand(paths: Sequence[Path]) -> dict[Path, Path]:
    """Every image once, and where it goes below the output folder; a folder gives all images in it and below it.

    Raises:
        ValueError: a folder without images.
    """
    images: dict[Path, tuple[Path, Path]] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise ValueError(f"no images in the folder {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        for file in files:
            # The name is kept: two links to one file are two images.
            below = file.relative_to(path) if path.is_dir() else Path(file.name)
            images.setdefault(file.parent.resolve() / file.name, (file, below))
    return dict(images.values())


def targets_in(folder: Path, images: Mapping[Path, Path], suffix: str) -> dict[Path, Path]:
    """The file of every image below a folder, the image's name with a suffix; ValueError where two have the same."""
    sources: dict[Path, Path] = {}
    for image, below in images.items():
        target = folder / below.with_name(f"{below.name}{suffix}")
        if (other := sources.setdefault(target, image)) != image:
            raise ValueError(f"{other} and {image} would both be written to {target}; run them to two folders")
    return {image: target for target, image in sources.items()}


def model_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that decide upsampled features, as metadata of files."""
    file = arguments.backbone_weights
    if file is not None:
        backbone_weights = resolve(Path(file), strict=True).identity()
    else:
        folder = TINY_BACKBONES.get(arguments.backbone)
        backbone_weights = in_package(folder) if folder else "from the Hub"
    return {
        "backbone": arguments.backbone,
        "backbone_weights": backbone_weights,
        "weights": resolve(arguments.weights or arguments.backbone, arguments.strict).identity(),
        "layer": "last" if arguments.layer is None else str(arguments.layer),
        "options": json.dumps(dict(arguments.option), sort_keys=True),
        "scaling": json.dumps([arguments.mean, arguments.std]),
        "views": str(arguments.views),
        "asked_size": "x".join(map(str, arguments.size)) if arguments.size else "image",
        "input": str(arguments.input),
        "dtype": arguments.dtype,
        "loftup_version": __version__,
    }


def _finished(target: Path, image: Path, settings: dict[str, str]) -> bool:
    """Tell whether the file is there, of this image and with these settings; ValueError if it is there with others."""
    if not (os.path.exists(target) and os.path.exists(image)):  # Path.exists raises for a name that is too long
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(target, framework="pt") as handle:
            before = {"views": "1", **(handle.metadata() or {})}  # files that say nothing of views are of one
    except SafetensorError as error:
        reason = f"exists but is no safetensors file ({error})"
        raise ValueError(f"{target} {reason}; remove it") from error
    refuse_changed(target, before, {**settings, "image_file": stamp(image)})
    return True


def refuse_changed(target: Path, before: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Raise ValueError unless a file was written with these settings."""
    different = [(key, before.get(key), value) for key, value in settings.items() if before.get(key) != value]
    if changes := "; ".join(f"{key} {old!r}, now {new!r}" for key, old, new in different):
        raise ValueError(f"{target} was written with other settings ({changes}); pass --overwrite or another folder")
