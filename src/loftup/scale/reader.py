"""A reader of an extraction's output, picture by picture: nothing is loaded before it is asked for."""

import bisect
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import LoftUpError
from ..model import LoftUp
from . import storage
from .codec import decode_array, read_rows, row_counts
from .decode import decode, resized, result_size
from .folder import Folder, read_manifest
from .settings import Settings
from .sources import Place, contents

__all__ = ["Features", "Record", "open"]


def open(folder: "str | os.PathLike[str]", *, device: str = "cpu") -> "Features":
    """Open what :func:`loftup.scale.extract` wrote.

    Args:
        folder: local or a URL.
        device: to upsample on.

    Raises:
        LoftUpError: the folder has no manifest, or a damaged one.

    Examples:
        >>> import loftup
        >>> record = loftup.open("features/")[0]                # doctest: +SKIP
        >>> record.features.shape, record.dense((480, 640)).shape   # doctest: +SKIP
        (torch.Size([384, 16, 21]), torch.Size([384, 480, 640]))
    """
    return Features(os.fspath(folder), device)


class Features(Sequence["Record"]):
    """The pictures of a folder, in the order of its plan, without those that failed.

    Attributes:
        manifest: what ``manifest.json`` holds.
        settings: of the extraction.
    """

    def __init__(self, url: str, device: str = "cpu") -> None:
        self.manifest = read_manifest(url)
        self.settings = Settings.from_json(self.manifest["settings"])
        self.folder, self.device = Folder(url, self.settings), device
        self._near: tuple[str, int, list[dict[str, Any]]] = ("", 0, [])

    @cached_property
    def _shards(self) -> tuple[list[str], list[int]]:
        """Names of the shards, and the number of the pictures up to the end of each."""
        names = [name for name in storage.names(self.folder.file("data")) if name.endswith(self.folder.suffix)]
        counts = []
        for name in names:
            with storage.open_binary(self.folder.file("data", name)) as stream:
                counts.append(row_counts(stream, self.settings.format))
        return names, list(accumulate(counts))

    def __len__(self) -> int:
        ends = self._shards[1]
        return ends[-1] if ends else 0

    @overload
    def __getitem__(self, index: int) -> "Record": ...
    @overload
    def __getitem__(self, index: slice) -> "list[Record]": ...
    def __getitem__(self, index: "int | slice") -> "Record | list[Record]":
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        names, ends = self._shards
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        shard = bisect.bisect_right(ends, place)
        inside, name = place - (ends[shard - 1] if shard else 0), names[shard]
        near, first, rows = self._near
        if near != name or not first <= inside < first + len(rows):
            with storage.open_binary(self.folder.file("data", name)) as stream:
                first, rows = read_rows(stream, self.settings.format, inside)
            self._near = name, first, rows
        return Record(self, rows[inside - first])

    def __iter__(self) -> "Iterator[Record]":
        return (self[index] for index in range(len(self)))

    def errors(self) -> list[dict[str, str]]:
        """The pictures that failed: key, url, error."""
        return self.folder.errors()

    @cached_property
    def up(self) -> LoftUp:
        """The upsampler of the extraction; set another one with ``features.up = ...``."""
        settings = self.settings
        return LoftUp.from_pretrained(settings.weights or settings.backbone, device=self.device, strict=settings.strict)

    def __repr__(self) -> str:
        return f"Features({self.folder.url!r}: {len(self)} pictures, {', '.join(self.settings.save)})"


class Record:
    """A picture's row.

    Attributes:
        key: the picture's name.
        place: where the picture is.
        size: (H, W) of the picture, upright.
        row: the row as it is stored.
    """

    def __init__(self, source: Features, row: dict[str, Any]) -> None:
        self.source, self.row = source, row
        self.place = Place(**{name: row[name] for name in Place._fields})
        self.key, self.size = str(row["key"]), (int(row["height"]), int(row["width"]))

    def __getattr__(self, name: str) -> Tensor:
        """An output by its name: float32, features (C, h, w), pooled (C), points (N, C) and so on; labels as stored."""
        settings = self.__dict__["source"].settings if "source" in self.__dict__ else None
        if settings is None or name not in settings.save:
            kinds = ", ".join(settings.save) if settings else ""
            raise AttributeError(f"this record has no {name!r}; it has key, size, place, picture, dense() and {kinds}")
        if name == "pooled":
            return torch.tensor(self.row[name])
        array = decode_array(name, self.row)
        return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array.copy())

    def picture(self) -> Tensor:
        """The pixels, uint8 (3, H, W): of the stored picture, or of the source.

        Raises:
            OSError: the source is not there any more.
        """
        if self.row.get("image"):
            return decode(self.row["image"]["bytes"], self.key)
        content = contents([self.place])[0]
        if isinstance(content, OSError):
            raise OSError(
                f"{content}: upsampling needs the picture; bring it back, or extract with images=True"
            ) from content
        return decode(content, self.key)

    def dense(self, size: "int | tuple[int, int] | None" = None, **options: Any) -> Tensor:
        """Features of every pixel: the stored map, where it has that size, else made now from features and picture.

        Args:
            size: (H, W) of the result, or an int for a square; None means that of the extraction's upsampled outputs.
            options: of :meth:`loftup.LoftUp.forward`, such as ``head=``.

        Returns:
            (C, H, W) float32, or what ``head`` gives.

        Raises:
            LoftUpError: "features" were not saved.
            OSError: see :meth:`picture`.
        """
        wanted = (size, size) if isinstance(size, int) else size
        target = wanted or result_size(self.source.settings, *self.size)
        if "dense" in self.row and not options and tuple(self.row["dense_shape"][1:]) == tuple(target):
            return torch.from_numpy(decode_array("dense", self.row).copy())
        if "features" not in self.source.settings.save:
            raise LoftUpError(
                f"{self.source.folder.url} holds {', '.join(self.source.settings.save)}, no features to upsample to "
                f"{target[0]}x{target[1]}; extract with features in save"
            )
        pixels = torch.from_numpy(resized(self.picture(), target))[None].to(self.source.device)
        networks = self.source.manifest["networks"]
        mean, std = (pixels.new_tensor(networks[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std"))
        image = (pixels.float() / 255 - mean) / std
        features = self.features[None].to(self.source.device)
        return self.source.up(features, image, size=target, **options)[0]

    def __repr__(self) -> str:
        return f"Record({self.key!r}, {self.size[0]}x{self.size[1]}, {', '.join(self.source.settings.save)})"
