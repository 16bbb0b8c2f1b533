"""Pictures with class-agnostic masks from the kinds of data that people have; map-style and without state."""

import dataclasses
import inspect
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import LoftUpError, translate
from ...files import check_regular
from ...pictures import IMAGE_SUFFIXES
from .felzenszwalb import SCALES, felzenszwalb_map
from .picture_files import by_stem, find_files, find_pictures, label_maps, read_picture, stem_of
from .regions import LabelMap, Masks, Picture, Region, RleMasks, UnreadableError
from .sa1b import read_sa1b
from .shards import SA1BShards, is_pattern

__all__ = [
    "ImageFolder",
    "LabelFolder",
    "LabelMap",
    "Masks",
    "Part",
    "Picture",
    "RleMasks",
    "SA1BFolder",
    "SA1BShards",
    "Several",
    "Source",
    "UnreadableError",
    "open_source",
]

log = logging.getLogger("loftup")


class Source(Protocol):
    """Pictures by number; the same index and state of the generator give the same picture and masks."""

    def __len__(self) -> int:
        """Count the pictures."""

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """Read one picture.

        Args:
            index: 0 to ``len(self) - 1``.
            generator: decides what is random, such as which of several label maps is taken.

        Raises:
            UnreadableError: a file of the picture is damaged, or its masks do not fit it.
            IndexError: there is no such picture.
        """


class _Folder:
    """Pictures of a folder, by their names relative to it."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self._names = np.array(names)  # one block of memory, which worker processes share as it is

    def __len__(self) -> int:
        return len(self._names)

    def _name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"no picture {index}, there are {len(self)}")
        return str(self._names[index])


class SA1BFolder(_Folder):
    """A folder, and folders below it, of pictures with ``NAME.json`` beside them in SA-1B's layout.

    Args:
        path: of the folder.

    Raises:
        LoftUpError: there is no such folder, no picture has a json, or two pictures share one.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        folder = Path(path).expanduser()
        pictures = find_pictures(folder)
        jsons = {stem_of(name) for name in find_files(folder, [".json"])}
        pairs = by_stem([name for name in pictures if stem_of(name) in jsons], folder)
        if not pairs:
            remedy = f"make masks with: loftup masks {folder}"
            raise LoftUpError(f"none of the {len(pictures)} pictures in {folder} has a NAME.json beside it; {remedy}")
        _say_left_out(folder, "pictures without a json", len(pictures) - len(pairs))
        _say_left_out(folder, "json files without a picture", len(jsons) - len(pairs))
        super().__init__(folder, list(pairs.values()))

    @property
    def names(self) -> list[str]:
        """The pictures' names relative to the folder, in their order."""
        return [str(name) for name in self._names]

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`Source.read`."""
        name = self._name(index)
        path = self.path / name
        image, annotations = read_picture(path), path.with_suffix(".json")
        with translate(OSError, lambda error: f"cannot read {annotations}: {error.strerror or error}", UnreadableError):
            check_regular(annotations)
            content = annotations.read_bytes()
        return read_sa1b(name, image, content, str(annotations))


class LabelFolder(_Folder):
    """A folder, and folders below it, of pictures with label maps: every label of a map is one mask.

    Beside ``NAME.jpg`` (or another suffix) lies ``NAME.png``, or ``NAME.segK.png`` for every K of several maps, of
    which one is picked at random. A label map has one channel of 8 or 16 bits, or a palette whose indices are the
    labels.

    Args:
        path: of the folder.
        void: label that is no mask, such as VOC's 255; None where every label is one.

    Raises:
        LoftUpError: there is no such folder, no picture has a label map, or it cannot be told what belongs together.
    """

    def __init__(self, path: "str | os.PathLike[str]", void: int | None = None) -> None:
        self.void = void
        folder = Path(path).expanduser()
        maps, singles = label_maps(find_files(folder, IMAGE_SUFFIXES), folder)
        if not maps:
            expected = "a label map NAME.png or NAME.segK.png beside it"
            raise LoftUpError(f"none of the {len(singles)} pictures in {folder} has {expected}")
        _say_left_out(folder, "pictures without a partner (picture or label map)", len(singles))
        super().__init__(folder, list(maps))
        self._maps = np.array(["\n".join(names) for names in maps.values()])  # one block of memory, too

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`Source.read`."""
        name, maps = self._name(index), str(self._maps[index]).split("\n")
        image = read_picture(self.path / name)
        path = self.path / maps[_pick(len(maps), generator)]
        labels = _read_labels(path)
        if labels.shape != image.shape[1:]:
            raise UnreadableError(
                f"{path} has {labels.shape[0]}x{labels.shape[1]} labels, {name} has "
                f"{image.shape[1]}x{image.shape[2]} pixels; expected the same size"
            )
        return Picture(name, image, LabelMap(labels, self.void))


class ImageFolder(_Folder):
    """A folder, and folders below it, of plain pictures; masks are Felzenszwalb's at a scale picked at random.

    They are made when they are first asked for, in a fifth of a second for a picture of 320x480; for many epochs they
    are better made once, with ``loftup masks``.

    Args:
        path: of the folder.
        scales: see :func:`loftup.train.masks.make.felzenszwalb_map`, as for the others.
        sigma: smoothing, in pixels.
        min_size: pixels that a segment has at least.
        side: short side that a larger picture is segmented at.

    Raises:
        LoftUpError: there is no such folder or no picture in it.
        ValueError: no scale is given.
    """

    def __init__(
        self,
        path: "str | os.PathLike[str]",
        scales: Sequence[float] = SCALES,
        *,
        sigma: float = 0.8,
        min_size: int = 100,
        side: int = 480,
    ) -> None:
        if not scales:
            raise ValueError("no scale given")
        folder = Path(path).expanduser()
        super().__init__(folder, find_pictures(folder))
        self.scales = list(scales)
        self.options: dict[str, Any] = {"sigma": sigma, "min_size": min_size, "side": side}

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`Source.read`."""
        name = self._name(index)
        image = read_picture(self.path / name)
        scale = self.scales[_pick(len(self.scales), generator)]
        return Picture(name, image, _LazyMasks(lambda: felzenszwalb_map(image, scale, **self.options)))


class _LazyMasks:
    """Masks that are made when they are first asked for: not every objective takes any."""

    def __init__(self, make: Callable[[], Masks]) -> None:
        self._make = make

    @cached_property
    def _masks(self) -> Masks:
        return self._make()

    def __len__(self) -> int:
        return len(self._masks)

    def crop(self, box: Region, size: tuple[int, int], keep: Sequence[int] | None = None) -> Tensor:
        """See :meth:`Masks.crop`."""
        return self._masks.crop(box, size, keep)


class Several:
    """Sources one after another; pictures are named by the number of their source and their name in it.

    Raises:
        ValueError: no source is given.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        if not sources:
            raise ValueError("no source given")
        self.sources = list(sources)
        self._ends = list(accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(f"no picture {index}, there are {len(self)}")
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        picture = self.sources[number].read(index - start, generator)
        return dataclasses.replace(picture, name=f"{number}/{picture.name}", source=number)


class Part:
    """Some pictures of a source.

    Args:
        source: of all of them.
        indices: of those to keep, in the order in which they are wanted.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`Source.read`."""
        return self.source.read(self.indices[index], generator)


KINDS: dict[str, Callable[..., Source]] = {
    "sa1b": SA1BFolder,
    "shards": SA1BShards,
    "labels": LabelFolder,
    "images": ImageFolder,
}


def open_source(path: "str | os.PathLike[str]", kind: str = "auto", **options: Any) -> Source:
    """Open pictures with masks, of whatever kind they are.

    >>> open_source("photos/")  # doctest: +SKIP
    >>> open_source("sa-1b/sa_{000000..000010}.tar")  # doctest: +SKIP

    Args:
        path: folder, tar file, or pattern of tar files.
        kind: ``"sa1b"``, ``"shards"``, ``"labels"`` or ``"images"``; ``"auto"`` looks: tar files are shards, a folder
            with jsons beside its pictures is SA-1B's, one with label maps beside them is of labels, any other of
            images.
        options: of the kind, such as the ``scales`` of :class:`ImageFolder`.

    Raises:
        LoftUpError: there is nothing, it fits no kind or two, the kind is unknown or has no such option.
    """
    if kind not in ("auto", *KINDS):
        raise LoftUpError(f"unknown kind of data {kind!r}; expected auto, {', '.join(KINDS)}")
    kind = _kind(path) if kind == "auto" else kind
    parameters = list(inspect.signature(KINDS[kind]).parameters)[1:]
    if unknown := sorted(options.keys() - set(parameters)):
        raise LoftUpError(
            f"{path} is data of kind {kind!r}, which has no option {', '.join(unknown)}; "
            f"it has {', '.join(parameters) or 'none'}"
        )
    return KINDS[kind](path, **options)


def _kind(path: "str | os.PathLike[str]") -> str:
    if is_pattern(path):
        return "shards"
    folder = Path(path).expanduser()
    names = find_files(folder, (*IMAGE_SUFFIXES, ".json", ".tar"))
    pictures = [name for name in names if name.lower().endswith(tuple(IMAGE_SUFFIXES))]
    stems = set(map(stem_of, pictures))
    kinds = []
    if any(name.lower().endswith(".tar") for name in names):
        kinds.append("shards")
    if any(name.lower().endswith(".json") and stem_of(name) in stems for name in names):
        kinds.append("sa1b")
    if pictures and label_maps(pictures, folder)[0]:
        kinds.append("labels")
    if len(kinds) > 1:
        raise LoftUpError(
            f"{folder} holds data of kinds {' and '.join(kinds)}; say which: in Python as kind=..., for training in "
            "data.kind or validation.kind"
        )
    if not kinds and not pictures:
        suffixes = ", ".join([".tar", *sorted(IMAGE_SUFFIXES)])
        raise LoftUpError(f"{folder} holds neither tar files nor pictures; looked for {suffixes}")
    return kinds[0] if kinds else "images"


def _read_labels(path: Path) -> NDArray[Any]:
    from PIL import Image

    try:
        check_regular(path)
        with Image.open(path) as picture:
            picture.load()
            mode, labels = picture.mode, np.array(picture)
    except Exception as error:  # as for pictures, a damaged file raises all kinds
        raise UnreadableError(f"cannot read the label map {path}: {error}") from error
    if labels.ndim != 2:
        expected = "a label map of one channel, 8 or 16 bits, or a palette"
        raise UnreadableError(f"{path} has mode {mode!r}; expected {expected}")
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _say_left_out(folder: Path, what: str, count: int) -> None:
    if count:
        log.warning("%s: left out %d %s", folder, count, what)
