"""``loftup masks``: class-agnostic masks for a folder of pictures."""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import alone_in, refuse_others
from ...pictures import encode
from ...progress import track
from ..data.picture_files import find_pictures
from ..data.regions import Picture, UnreadableError
from ..data.sa1b import write_file
from ..data.sources import SA1BFolder
from .make import MaskReport, check_outside, make_masks
from .makers import FelzenszwalbMaker, MaskMaker, SamMaker

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["overlay", "run"]

FELZENSZWALB = ("scales", "sigma", "min_size", "side")
SAM = ("points_per_side", "points_per_batch", "pred_iou_threshold", "stability_threshold")


def run(arguments: argparse.Namespace) -> int:
    """Make masks as the command line says; returns the exit status, 1 if some pictures failed."""
    folder: Path = arguments.folder.expanduser()
    target = arguments.output.expanduser() if arguments.output else folder
    preview = arguments.preview.expanduser() if arguments.preview else None
    maker = _maker(arguments)
    check_outside(folder, target)
    names = find_pictures(folder)
    if preview:
        for read in (folder, target):
            check_outside(read, preview)
            if read.resolve() == preview.resolve():
                raise ValueError(f"the previews would be written among the pictures in {read}; choose another folder")
        refuse_others((preview / name).with_suffix(".jpg") for name in names)
    inside = {os.path.dirname(name) for name in names}
    with contextlib.ExitStack() as stack:
        for place in dict.fromkeys(filter(None, (target, preview))):
            stack.enter_context(alone_in(place, inside))
        report = make_masks(folder, maker, target, overwrite=arguments.overwrite)
        _tell(report, target)
        failed = len(report.failed)
        if preview and (report.counts or report.finished):
            failed += _write_previews(SA1BFolder(target), preview)
    return 1 if failed else 0


def _maker(arguments: argparse.Namespace) -> MaskMaker:
    names, others = (SAM, FELZENSZWALB) if arguments.sam else (FELZENSZWALB, SAM)
    if strays := [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) is not None]:
        raise ValueError(
            f"{', '.join(strays)} would do nothing: "
            + ("a SAM model is asked for" if arguments.sam else "Felzenszwalb's masks are asked for; see --sam")
        )
    options: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.sam:
        return SamMaker(arguments.sam, device=arguments.device, **options)
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device {arguments.device} would do nothing: Felzenszwalb's masks are made on the CPU")
    from ..config import FelzenszwalbConfig, checked

    return FelzenszwalbMaker(**vars(checked(FelzenszwalbConfig, options, "masks")))


def _tell(report: MaskReport, target: Path) -> None:
    say = functools.partial(print, file=sys.stderr)
    for name, reason in report.failed.items():
        say(f"loftup masks: {name}: {reason}")
    if report.finished:
        say(f"{report.finished} pictures are finished already")
    if empty := report.counts.count(0):
        say(f"{empty} pictures have no masks at all")
    masks = f" (median {median(report.counts):.0f} masks)" if report.counts else ""
    count = len(report.counts)
    say(f"made the masks of {count} of {count + len(report.failed)} pictures{masks}: {target}")


def _write_previews(source: SA1BFolder, folder: Path) -> int:
    """Draw all that are missing or older than their masks; returns the number that failed."""
    paths = [(folder / name).with_suffix(".jpg") for name in source.names]
    masks = [(source.path / name).with_suffix(".json") for name in source.names]
    waiting = [index for index, path in enumerate(paths) if not _newer(path, masks[index])]
    unreadable: list[str] = []
    for index in track(waiting, "previews", len(waiting), unit="images"):
        try:
            picture = source.read(index, torch.Generator())
        except UnreadableError as error:
            unreadable.append(str(error))
            continue
        write_file(paths[index], encode(overlay(picture), "JPEG", quality=90))
    for reason in unreadable:
        print(f"loftup masks: no preview: {reason}", file=sys.stderr)
    if there := len(paths) - len(waiting):
        print(f"{there} previews are there already", file=sys.stderr)
    print(f"wrote {len(waiting) - len(unreadable)} previews to {folder}", file=sys.stderr)
    return len(unreadable)


def _newer(path: Path, masks: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= masks.stat().st_mtime_ns


def overlay(picture: Picture, keep: Sequence[int] | None = None, opacity: float = 0.6) -> "Image.Image":
    """Draw masks over a picture in random colours, the same at every call, one after another as training applies them.

    Args:
        picture: with its masks.
        keep: indices of the masks to draw; None means all.
        opacity: of the colours, in [0, 1].

    Returns:
        A PIL image of the picture's size.
    """
    from PIL import Image

    height, width = picture.image.shape[1:]
    indices = range(len(picture.masks)) if keep is None else keep
    colours = torch.randint(256, (len(picture.masks), 3), generator=torch.Generator().manual_seed(0)).float()
    canvas: Tensor = picture.image.float()
    for index in indices:
        # One at a time: a hundred masks at the size of SA-1B's pictures would be 340 MB.
        for mask in picture.masks.crop((0, 0, height, width), (height, width), [index]):
            blend = opacity * colours[index][:, None, None] + (1 - opacity) * picture.image
            canvas = torch.where(mask, blend, canvas)
    return Image.fromarray(canvas.round().to(torch.uint8).movedim(0, -1).numpy())
