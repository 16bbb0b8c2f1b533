"""Datasets and their kinds of samples, which readers make and tasks take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

__all__ = [
    "KINDS",
    "CorrespondenceSample",
    "Dataset",
    "GeometrySample",
    "InteractiveSample",
    "Samples",
    "SegmentationSample",
    "VideoSequence",
    "thinned",
]


@dataclass(frozen=True)
class SegmentationSample:
    """A picture with a class for every pixel.

    Args:
        name: unique in its split.
        image: (3, H, W) uint8.
        labels: (H, W) int64 in [0, classes), -1 where there is none.
    """

    name: str
    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GeometrySample:
    """A picture with depth and surface normals.

    Args:
        name: unique in its split.
        image: (3, H, W) uint8.
        depth: (H, W) float32 in metres, NaN where unknown.
        normals: (3, H, W) float32, unit vectors in camera coordinates (x right, y down, z forward, so that a surface
            that faces the camera has z = -1), NaN where unknown.
    """

    name: str
    image: Tensor
    depth: Tensor
    normals: Tensor


@dataclass(frozen=True)
class InteractiveSample:
    """A picture with one object in it to select.

    Args:
        name: unique in its split.
        image: (3, H, W) uint8.
        mask: (H, W) int64: 1 object, 0 not, -1 not judged.
    """

    name: str
    image: Tensor
    mask: Tensor


@dataclass(frozen=True)
class CorrespondenceSample:
    """Two pictures and points of the one that are found in the other.

    Args:
        name: unique in its split.
        source: (3, H, W) uint8.
        target: (3, H', W') uint8.
        source_points: (N, 2) float32, (x, y) in pixels of the source, centres at whole numbers; N > 0.
        target_points: (N, 2) float32, where they are in the target.
        target_box: (left, top, right, bottom) of the object in the target, in pixels; None where there is none.
        category: of the object; empty where there is none.
    """

    name: str
    source: Tensor
    target: Tensor
    source_points: Tensor
    target_points: Tensor
    target_box: tuple[float, float, float, float] | None = None
    category: str = ""


class VideoSequence(Protocol):
    """Frames of a video, read one at a time; all of one size."""

    @property
    def name(self) -> str:
        """Unique in its split."""

    def __len__(self) -> int:
        """Number of frames."""

    def frame(self, index: int) -> Tensor:
        """(3, H, W) uint8."""

    def annotation(self, index: int) -> Tensor:
        """(H, W) int64: 0 background, 1, 2, ... objects, -1 not judged; those of frame 0 are to be followed."""


# Readers are registered and tasks listed by these names.
KINDS = {
    "labels": SegmentationSample,
    "geometry": GeometrySample,
    "objects": InteractiveSample,
    "pairs": CorrespondenceSample,
    "sequences": VideoSequence,
}
T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Samples(Sequence[T]):
    """Samples that are read when they are asked for.

    Args:
        entries: one a sample, its files for example.
        read: makes the sample of an entry.
    """

    entries: Sequence[Any]
    read: Callable[[Any], T]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.read(self.entries[index])


@dataclass(frozen=True)
class Dataset(Generic[T]):
    """Splits of a dataset.

    Args:
        name: of the dataset.
        train: to learn heads from; empty where a task learns nothing.
        val: to judge by.
        classes: names of the classes, for segmentation.
        colours: (R, G, B) in 0..255 of every class; empty for colours made up.
    """

    name: str
    train: Sequence[T]
    val: Sequence[T]
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)

    def check_classes(self) -> None:
        """Raise ValueError if the classes have no names."""
        if not self.classes:
            raise ValueError(f"{self.name} names no classes, expected one name for every label")


def thinned(dataset: Dataset[T], every: tuple[int, int]) -> Dataset[T]:
    """Every Nth sample of the training split and of the validation split, beginning with the first."""
    splits = zip((dataset.train, dataset.val), every, strict=True)
    train, val = (Samples(range(0, len(split), step), split.__getitem__) for split, step in splits)
    return replace(dataset, train=train, val=val)
