"""Reading the files of datasets, with errors that say what was expected where."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import LoftUpError, translate
from ...files import content_of, expect_file
from ...pictures import open_picture, require_pillow

__all__ = ["check_size", "expect_folder", "list_files", "read_image", "read_lines", "read_map"]


def expect_folder(folder: Path, content: str) -> Path:
    """The folder, or LoftUpError if there is none."""
    if not folder.is_dir():
        raise LoftUpError(f"expected a folder with {content} at {folder}, found {content_of(folder)}")
    return folder


def list_files(folder: Path, pattern: str, content: str) -> list[Path]:
    """Files of a folder that match a pattern, sorted; LoftUpError if there are none."""
    files = sorted(expect_folder(folder, content).glob(pattern))
    if not files:
        raise LoftUpError(f"expected {content} as {pattern} in {folder}, found no such file")
    return files


def read_lines(file: Path, content: str) -> list[str]:
    """Lines of a text file that are not empty."""
    lines = [line.strip() for line in expect_file(file, content).read_text().splitlines()]
    return [line for line in lines if line]


def read_image(file: Path) -> Tensor:
    """(3, H, W) uint8."""
    expect_file(file, "a picture")
    with translate(OSError, str):
        return torch.from_numpy(np.array(open_picture(file))).movedim(-1, 0).contiguous()


def read_map(file: Path, content: str = "a label map") -> Tensor:
    """(H, W) int64 of a picture with one channel, palette indices as they are; a map in three channels (3, H, W)."""
    expect_file(file, content)
    try:
        with require_pillow().open(file) as picture:
            values = torch.from_numpy(np.array(picture).astype(np.int64))
    except Exception as error:  # a damaged file raises SyntaxError, struct.error and others
        raise LoftUpError(f"cannot read {content} from {file}: {error}") from error
    return values if values.ndim == 2 else values.movedim(-1, 0)[:3]


def check_size(values: Tensor, file: Path, image: Tensor, picture: Path) -> None:
    """LoftUpError unless a map (H, W) from a file has the size of its picture (3, H, W)."""
    if values.shape != image.shape[1:]:
        raise LoftUpError(
            f"{file} is {tuple(values.shape)}, but its picture {picture} is {tuple(image.shape[1:])}; expected a map "
            "with one channel and the picture's size"
        )
