"""Readers of video object segmentation datasets."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import LoftUpError
from .base import Dataset, VideoSequence
from .files import expect_folder, list_files, read_image, read_lines, read_map
from .registry import register

__all__ = ["DavisSequence", "davis", "davis2016", "one_object_files"]


@dataclass(frozen=True)
class DavisSequence:
    """A sequence of DAVIS: the files of its frames and annotations, and whether all that is marked is one object."""

    name: str
    frames: list[Path]
    annotations: list[Path]
    one_object: bool = False

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Tensor:
        """(3, H, W) uint8."""
        return read_image(self.frames[index])

    def annotation(self, index: int) -> Tensor:
        """(H, W) int64: 0 background, 1, 2, ... objects, -1 (255 in the file) not judged."""
        values = read_map(self.annotations[index], "a palette picture with object numbers")
        if self.one_object:
            return (values > 0).long()
        return values.where(values < 255, -1)


@register("davis", "sequences")
def davis(root: Path) -> Dataset[VideoSequence]:
    """DAVIS-2017: ``JPEGImages/480p/SEQUENCE``, ``Annotations/480p/SEQUENCE``, ``ImageSets/2017/val.txt``."""
    sequences: list[VideoSequence] = []
    for name in read_lines(root / "ImageSets" / "2017" / "val.txt", "names of sequences"):
        frames = list_files(root / "JPEGImages" / "480p" / name, "*.jpg", f"frames of {name}")
        folder = root / "Annotations" / "480p" / name
        sequences.append(DavisSequence(name, frames, [folder / f"{frame.stem}.png" for frame in frames]))
    return Dataset("davis", [], sequences)


@register("davis2016", "sequences")
def davis2016(root: Path) -> Dataset[VideoSequence]:
    """DAVIS-2016: ``JPEGImages/SEQUENCE``, ``Annotations/SEQUENCE``, or both below ``480p``; one object a sequence.

    All sequences that have annotations are taken, and every value above 0 is the object.
    """
    sequences: list[VideoSequence] = [
        DavisSequence(name, [frame for frame, _ in files], [file for _, file in files], one_object=True)
        for name, files in one_object_files(root).items()
    ]
    return Dataset("davis2016", [], sequences)


def one_object_files(root: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Frames of DAVIS-2016 with their annotations, by the sequences' names."""
    inner = "480p" if (root / "Annotations" / "480p").is_dir() else ""
    pictures, annotations = root / "JPEGImages" / inner, root / "Annotations" / inner
    names = sorted(child.name for child in expect_folder(annotations, "a folder for every sequence").iterdir())
    files = {}
    for name in (each for each in names if (annotations / each).is_dir()):
        frames = list_files(pictures / name, "*.jpg", f"frames of {name}")
        files[name] = [(frame, annotations / name / f"{frame.stem}.png") for frame in frames]
    if not files:
        raise LoftUpError(f"expected a folder for every sequence in {annotations}, found none")
    return files
