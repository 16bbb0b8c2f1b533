"""Finding pictures in folders of any depth, and reading them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import LoftUpError, translate
from ...pictures import IMAGE_SUFFIXES, open_picture, require_pillow, to_rgb
from .regions import UnreadableError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["by_stem", "decode_picture", "find_files", "find_pictures", "label_maps", "read_picture", "stem_of"]


def find_files(folder: "str | os.PathLike[str]", suffixes: Iterable[str]) -> list[str]:
    """Names of the files in a folder and the folders below it, sorted; hidden ones are left out.

    Args:
        folder: links to folders in it are followed.
        suffixes: that a file may have, with the dot and in lower case; a file's own may be in any case.

    Returns:
        Names relative to the folder, with ``/`` between their parts.

    Raises:
        LoftUpError: the folder is missing or no folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise LoftUpError(f"no folder {root}" + (": it is a file" if root.exists() else ""))
    return sorted(_walk(root, tuple(suffixes)))


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    places = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        # A link to a folder above would never end.
        if (place := os.path.realpath(parent)) in places:
            folders.clear()
            continue
        places.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(parent).relative_to(root)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield (inside / name).as_posix()


def find_pictures(folder: "str | os.PathLike[str]") -> list[str]:
    """Names of the pictures in a folder, as :func:`find_files` gives them; LoftUpError if there are none."""
    names = find_files(folder, IMAGE_SUFFIXES)
    if not names:
        raise LoftUpError(f"no pictures in the folder {folder}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return names


def by_stem(names: Iterable[str], folder: "str | os.PathLike[str]") -> dict[str, str]:
    """Names by what they are without their suffix; LoftUpError if two are the same then."""
    stems: dict[str, str] = {}
    for name in names:
        if (other := stems.setdefault(stem_of(name), name)) != name:
            raise LoftUpError(f"{other} and {name} in {folder} would share their masks; rename one, or take it out")
    return stems


def stem_of(name: str) -> str:
    """A name without its suffix, folders kept."""
    return str(PurePosixPath(name).with_suffix(""))


def label_maps(names: Sequence[str], folder: "str | os.PathLike[str]") -> tuple[dict[str, list[str]], list[str]]:
    """Pictures with the names of their label maps, and the files that have no partner."""
    others = {stem_of(name) for name in names if not _is_png(name)}
    maps: dict[str, list[str]] = {}
    pictures: dict[str, list[str]] = {}
    for name in names:
        stem = stem_of(name)
        if _is_png(name) and (match := re.fullmatch(r"(.+)\.seg\d+", stem)):
            maps.setdefault(match[1], []).append(name)
        elif _is_png(name) and stem in others:
            maps.setdefault(stem, []).append(name)
        else:
            pictures.setdefault(stem, []).append(name)
    both = maps.keys() & pictures.keys()
    for stem in sorted(both):
        by_stem(pictures[stem], folder)
        if len({stem_of(name) == stem for name in maps[stem]}) > 1:
            raise LoftUpError(
                f"{pictures[stem][0]} in {folder} has label maps of two kinds, {' and '.join(sorted(maps[stem])[:2])}; "
                "keep one kind"
            )
    pairs = {pictures[stem][0]: maps[stem] for stem in both}
    groups = (files for group in (maps, pictures) for stem, files in group.items() if stem not in both)
    singles = [name for files in groups for name in files]
    return dict(sorted(pairs.items())), singles


def _is_png(name: str) -> bool:
    return name.lower().endswith(".png")


def read_picture(path: Path) -> Tensor:
    """Read a picture as (3, H, W) uint8 RGB, upright; UnreadableError if that fails."""
    with translate((OSError, LoftUpError), str, UnreadableError):
        return _tensor(open_picture(path))


def decode_picture(content: bytes, name: str) -> Tensor:
    """Read a picture from memory, as :func:`read_picture` does from a file; errors call it by the name."""
    pil = require_pillow()
    try:
        with pil.open(BytesIO(content)) as picture:
            picture.load()
            return _tensor(to_rgb(picture, name))
    except LoftUpError as error:
        raise UnreadableError(str(error)) from error
    except Exception as error:  # as of files: a damaged one raises SyntaxError, struct.error and others
        raise UnreadableError(f"cannot read the image {name}: {error}") from error


def _tensor(picture: "Image.Image") -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
