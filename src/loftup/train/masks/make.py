"""Masks for a folder of pictures, written beside them in SA-1B's layout."""

import contextlib
import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import FAILURES, LoftUpError, one_line, translate
from ...files import made_here, refuse_others
from ...pictures import open_picture
from ...progress import track
from ...version import __version__
from ..data.picture_files import by_stem, find_pictures, label_maps
from ..data.sa1b import write_file, write_sa1b
from .makers import MaskMaker

__all__ = ["MaskReport", "check_outside", "make_masks"]


@dataclass
class MaskReport:
    """Outcome of :func:`make_masks`."""

    counts: list[int] = field(default_factory=list)  # masks of each picture that was made, in the order of the pictures
    finished: int = 0  # pictures that were finished already
    # Pictures that could not be read or segmented, with the reason.
    failed: dict[str, str] = field(default_factory=dict)


def make_masks(
    images: "str | os.PathLike[str]",
    maker: MaskMaker,
    output: "str | os.PathLike[str] | None" = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> MaskReport:
    """Make masks for all pictures of a folder and write them in SA-1B's layout; a run that was cut off is resumed.

    Args:
        images: folder of pictures, and of folders of them.
        maker: of the masks.
        output: folder that the pictures are copied to, beside their masks; None leaves them where they are.
        overwrite: make masks anew that are there already.
        progress: show a bar.

    Returns:
        What was done. A picture that cannot be read is counted there and leaves the others alone.

    Raises:
        LoftUpError: no pictures; some have label maps; two would share a json; a json is there already that was
            made with other settings, of another picture of the name or by another program; or ``output`` holds a
            picture of the name that is no copy made here.
        ValueError: ``output`` is inside ``images``.
        OSError: a file cannot be written; it is named, and nothing half-written remains.
    """
    folder = Path(images).expanduser()
    target = folder if output is None else Path(output).expanduser()
    check_outside(folder, target)
    names = find_pictures(folder)
    if maps := label_maps(names, folder)[0]:
        name, (first, *_) = next(iter(maps.items()))
        raise LoftUpError(
            f"{len(maps)} pictures in {folder} have label maps, such as {first} beside {name}: training takes "
            "those as masks, with data.kind=labels, and no others are needed. To make masks all the same, or if these "
            "are no label maps, take the .png files out"
        )
    pictures = by_stem(names, folder)
    settings = {stem: _settings(maker.settings, folder / name) for stem, name in pictures.items()}
    waiting = {}
    for stem, name in pictures.items():
        path, copy = target / f"{stem}.json", target / name
        if _finished(path, copy, settings[stem], overwrite):
            continue
        if target != folder and os.path.lexists(copy) and not _copied(copy, folder / name, path):
            refuse_others([copy])
        waiting[stem] = name
    report = MaskReport(finished=len(pictures) - len(waiting))
    left = waiting.items()
    for stem, name in track(left, "masks", len(left), unit="images") if progress else left:
        try:
            picture = open_picture(folder / name)
            annotations = maker(picture)
        except FAILURES as error:  # a wrong argument (TypeError) ends the run
            report.failed[name] = one_line(error)
            continue
        info = {"made_by": f"loftup {__version__}", "settings": settings[stem]}
        try:
            if target != folder:
                write_file(target / name, (folder / name).read_bytes())
            write_sa1b(target / f"{stem}.json", annotations, picture.width, picture.height, Path(name).name, info)
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EILSEQ):  # this name alone is none for the file system
                raise
            report.failed[name] = one_line(error)
            continue
        report.counts.append(len(annotations))
    return report


def check_outside(folder: Path, target: Path) -> None:
    """Raise ValueError if what is written to ``target`` would be read as pictures of ``folder`` the next time."""
    if folder.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is inside {folder}, whose pictures include those below it; choose another folder")


def _settings(settings: dict[str, Any], picture: Path) -> dict[str, Any]:
    # The size in bytes tells another picture of the name, and unlike the time stays when a data set is moved.
    return {**settings, "picture_bytes": picture.stat().st_size if os.path.exists(picture) else None}


def _finished(path: Path, picture: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Tell whether masks and picture are there and made with these settings; LoftUpError if with others.

    With ``overwrite`` masks that were made here with any settings are as if they were not there.
    """
    if not os.path.lexists(path):
        return False
    if not made_here(path):
        raise LoftUpError(
            f"{path} was not made by loftup masks, which replaces only its own files; move it away, or write to "
            "another folder"
        )
    if overwrite:
        return False
    remedy = "overwrite it (--overwrite) or write to another folder"
    with translate((ValueError, KeyError, TypeError, RecursionError), f"{path} is damaged; {remedy}"):
        before = dict(json.loads(path.read_bytes())["info"]["settings"])
    pairs = {key: (before.get(key), settings.get(key)) for key in sorted({*settings, *before})}
    if changes := [f"{key} {old!r}, now {new!r}" for key, (old, new) in pairs.items() if old != new]:
        raise LoftUpError(f"{path} was made with other settings ({'; '.join(changes)}); {remedy}")
    return picture.exists()


def _copied(copy: Path, picture: Path, path: Path) -> bool:
    """Tell whether a picture is the copy of one, or that which the masks beside it, made here, are of."""
    if not copy.is_file():
        return False
    size = copy.stat().st_size
    if picture.is_file() and size == picture.stat().st_size and copy.read_bytes() == picture.read_bytes():
        return True
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return made_here(path) and bool(json.loads(path.read_bytes())["info"]["settings"]["picture_bytes"] == size)
    return False
