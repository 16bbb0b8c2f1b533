"""SA-1B's tar files, read at any place: an index of where each member lies, and one short read a member."""

import glob
import logging
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ...errors import LoftUpError, translate
from ...files import check_regular
from ...pictures import IMAGE_SUFFIXES
from .picture_files import decode_picture, find_files
from .regions import Picture, UnreadableError
from .sa1b import read_sa1b

__all__ = ["SA1BShards", "is_pattern"]

log = logging.getLogger("loftup")
PICTURES = {suffix[1:] for suffix in IMAGE_SUFFIXES}


class SA1BShards:
    """Tar files whose members ``NAME.jpg`` and ``NAME.json`` are pictures and masks in SA-1B's layout.

    The headers are read once, when the source is made; a picture is then read without what is before it, and by any
    process, because no file is kept open.

    Args:
        path: a tar file, a folder of them, or a pattern: ``sa-1b/*.tar``, ``sa-1b/sa_{000000..000010}.tar``.

    Raises:
        LoftUpError: webdataset is missing (extra ``train``); there are no such files; one is truncated, compressed or
            no tar file; or no picture in them has a json.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self.shards = _expand(path)
        self.root = Path(os.path.commonpath([shard.parent for shard in self.shards]))
        names, places, singles = [], [], 0
        for number, shard in enumerate(self.shards):
            for key, members in _members(shard).items():
                if len(members) < 2:
                    singles += 1
                    continue
                names.append(f"{shard.relative_to(self.root).as_posix()}/{key}")
                places.append([number, *members["picture"], *members["json"]])
        if not names:
            raise LoftUpError(
                f"no picture in {path} has a json beside it: {len(self.shards)} tar files, {singles} members without a "
                "partner; expected members NAME.jpg and NAME.json as in SA-1B"
            )
        if singles:
            log.warning("%s: left out %d members without a partner (picture or json)", path, singles)
        self._names, self._places = np.array(names), np.array(places)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int, generator: torch.Generator) -> Picture:
        """See :meth:`loftup.train.data.sources.Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(f"no picture {index}, there are {len(self)}")
        name, (number, *places) = str(self._names[index]), self._places[index].tolist()
        where = os.fspath(self.root / name)
        try:
            with open(self.shards[number], "rb") as stream:
                picture, annotations = _part(stream, *places[:2]), _part(stream, *places[2:])
        except OSError as error:
            raise UnreadableError(f"cannot read {where}: {error}") from error
        return read_sa1b(name, decode_picture(picture, where), annotations, f"{where}.json")


def is_pattern(path: "str | os.PathLike[str]") -> bool:
    """Tell whether a path means tar files: one, or a pattern of them."""
    text = os.fspath(path)
    return text.lower().endswith(".tar") or (bool(set(text) & set("*?[{")) and not Path(text).exists())


def _expand(path: "str | os.PathLike[str]") -> list[Path]:
    with translate(ImportError, 'tar files need webdataset: pip install "loftup[train]"'):
        from webdataset.shardlists import expand_urls
    text = os.path.expanduser(path)
    if os.path.isdir(text):
        shards = [Path(text) / name for name in find_files(text, [".tar"])]
    else:
        patterns = [text] if os.path.exists(text) else expand_urls(text)
        matches = {name: [name] if os.path.exists(name) else sorted(glob.glob(name)) for name in patterns}
        if missing := [pattern for pattern, files in matches.items() if not files]:
            raise LoftUpError(f"no tar file {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        shards = [Path(file) for files in matches.values() for file in files]
    if not shards:
        raise LoftUpError(f"no tar files in the folder {text}")
    return [shard.absolute() for shard in shards]


def _members(shard: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Where (offset, size) each picture and its json lie in a tar file, by their name without suffix."""
    from webdataset.tariterators import base_plus_ext

    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        check_regular(shard)
        with tarfile.open(shard, "r:") as tar:  # compressed files cannot be read at any place
            for member in tar:
                key, suffix = base_plus_ext(member.name)
                kind = "json" if suffix == "json" else "picture"
                if not member.isfile() or suffix is None or (kind == "picture" and suffix.lower() not in PICTURES):
                    continue
                entry = members.setdefault(key.removeprefix("./"), {})
                if kind in entry:
                    raise LoftUpError(f"{shard} holds two {kind} members for {key}; expected one")
                entry[kind] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise LoftUpError(
            f"cannot read {shard} as a tar file: truncated, compressed or damaged ({error}); fetch or pack it anew"
        ) from error
    return members


def _part(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    content = stream.read(size)
    if len(content) != size:
        raise OSError(f"the tar file ends {size - len(content)} bytes early")
    return content
