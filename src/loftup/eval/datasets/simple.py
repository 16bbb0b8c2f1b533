"""The simple layout, which any labelled pictures can be brought into: two folders, two lists and the classes' names."""

import json
from pathlib import Path

from ...errors import LoftUpError
from ...files import expect_file
from .files import read_lines

__all__ = ["has_simple_layout", "named_classes", "named_files"]


def has_simple_layout(root: Path) -> bool:
    """Tell whether a folder holds ``train.txt`` or ``test.txt`` itself, as no published layout does."""
    return (root / "train.txt").is_file() or (root / "test.txt").is_file()


def named_files(root: Path, split: str, maps: str = "labels") -> list[tuple[Path, Path]]:
    """Files of every name in ``SPLIT.txt``: ``images/NAME.jpg`` (or ``.png``) and ``MAPS/NAME.png``.

    Raises:
        LoftUpError: the list is not there or empty, or a picture is missing.
    """
    names = read_lines(root / f"{split}.txt", "names of pictures")
    if not names:
        raise LoftUpError(f"{root / split}.txt names no picture; expected one name a line")
    files = []
    for name in names:
        png = root / "images" / f"{name}.png"
        picture = png if png.is_file() else expect_file(root / "images" / f"{name}.jpg", "a picture (.jpg or .png)")
        files.append((picture, root / maps / f"{name}.png"))
    return files


def named_classes(root: Path) -> tuple[str, ...]:
    """Names of the classes 0, 1, 2, ... from ``classes.json``, a list of strings."""
    file = expect_file(root / "classes.json", "the names of the classes")
    try:
        names = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise LoftUpError(f"{file} is no JSON: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise LoftUpError(f"expected a list of the classes' names in {file}, got {str(names)[:80]}")
    return tuple(names)
