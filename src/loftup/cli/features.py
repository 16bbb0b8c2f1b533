"""The command ``loftup features``: upsampled features of many pictures, written so that a second run goes on."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FAILURES, one_line
from ..files import alone_in, refuse_others, stamp, write_atomically
from ..pictures import IMAGE_SUFFIXES
from ..version import __version__
from ..weights.catalogue import TINY_BACKBONES
from ..weights.names import in_package, resolve
from .options import add_model_options, place

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..model import LoftUp

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("features", help="write upsampled features of images as float16 safetensors")
    parser.set_defaults(run=_run)
    parser.add_argument("images", nargs="+", type=place, metavar="IMAGE", help="image files or folders of them")
    add_model_options(parser)
    parser.add_argument("-o", "--output", type=place, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="write files of loftup's anew that are there already")


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .models import check_backbone, load_models

    check_backbone(arguments)
    images = _expand(arguments.images)
    targets = _targets(images, arguments.output)
    settings = _settings(arguments)
    refuse_others(targets.values())
    waiting = [image for image in images if arguments.overwrite or not _finished(targets[image], image, settings)]
    if skipped := len(images) - len(waiting):
        print(f"{skipped} of {len(images)} images are finished already", file=sys.stderr)
    if not waiting:
        return 0
    failed = 0
    with alone_in(arguments.output):
        backbone, up = load_models(arguments)
        for image in tqdm(waiting, unit="image", desc=arguments.backbone, disable=None):
            try:
                write_atomically(targets[image], _features(arguments, backbone, up, image, settings))
            except (*FAILURES, OverflowError) as error:
                failed += 1
                tqdm.write(f"loftup features: {image}: {one_line(error)}", file=sys.stderr)
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


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images directly in them, each once; an empty folder is an error."""
    images: dict[Path, Path] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"no images in the folder {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        for file in files:
            # The name is kept: two links to one file are two images.
            images.setdefault(file.parent.resolve() / file.name, file)
    return list(images.values())


def _targets(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    sources: dict[Path, Path] = {}
    for image in images:
        target = folder / f"{image.name}.safetensors"
        if (other := sources.setdefault(target, image)) != image:
            raise ValueError(f"{other} and {image} would both be written to {target}; run them to two folders")
    return {image: target for target, image in sources.items()}


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that decide the content of a features file, as safetensors metadata."""
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

    settings = {**settings, "image_file": stamp(image)}
    try:
        with safe_open(target, framework="pt") as handle:
            before = {"views": "1", **(handle.metadata() or {})}  # files that say nothing of views are of one
    except SafetensorError as error:
        reason = f"exists but is no safetensors file ({error})"
        raise ValueError(f"{target} {reason}; remove it") from error
    different = [(key, before.get(key), value) for key, value in settings.items() if before.get(key) != value]
    if changes := "; ".join(f"{key} {old!r}, now {new!r}" for key, old, new in different):
        raise ValueError(f"{target} was written with other settings ({changes}); pass --overwrite or another folder")
    return True
