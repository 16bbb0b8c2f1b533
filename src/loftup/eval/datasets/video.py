"""Reader of video object segmentation datasets."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .base import Dataset, VideoSequence
from .files import list_files, read_image, read_lines, read_map
from .registry import register

__all__ = ["DavisSequence", "davis"]


@dataclass(frozen=True)
class DavisSequence:
    """A sequence of DAVIS: the files of its frames and annotations."""

    name: str
    frames: list[Path]
    annotations: list[Path]

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Tensor:
        """(3, H, W) uint8."""
        return read_image(self.frames[index])

    def annotation(self, index: int) -> Tensor:
        """(H, W) int64: 0 background, 1, 2, ... objects, -1 (255 in the file) not judged."""
        values = read_map(self.annotations[index], "a palette picture with object numbers")
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
