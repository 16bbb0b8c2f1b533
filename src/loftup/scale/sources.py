"""Where the pictures are: folders, WebDataset tars, and Parquet with image bytes or links."""

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..errors import LoftUpError, one_line
from ..pictures import IMAGE_SUFFIXES
from . import storage

__all__ = ["Place", "contents", "list_pictures"]

BYTES, LINKS = ("image", "bytes", "image_bytes", "jpg", "jpeg", "png", "img"), ("url", "image_url", "URL", "link")
READERS = 16  # remote files that are read at once


class Place(NamedTuple):
    """Where a picture is; its key is another one for every picture."""

    key: str
    url: str
    offset: int = -1  # in a tar: where its bytes begin, and how many there are
    length: int = -1
    group: int = -1  # in Parquet: its row group, and its row in that
    row: int = -1
    column: str = ""


def list_pictures(sources: Sequence[str], column: str | None = None, leave_out: str = "") -> Iterator[Place]:
    """All pictures of some sources, in a fixed order.

    Args:
        sources: folders (with all below), ``.tar`` files of WebDataset, ``.parquet`` files, or pictures; local or URLs.
        column: of Parquet files that holds the pictures, as bytes, as a struct with ``bytes``, or as links; None looks
            for usual names.
        leave_out: a folder that is no source, as it is the output.

    What lies beside pictures and holds none is passed over: Parquet without a column of them, Parquet of links beside
    the tar of its name (as img2dataset writes them), hidden files, and what an extraction wrote.

    Raises:
        LoftUpError: a source without pictures, a compressed tar, Parquet without such a column.
        FileNotFoundError: a source is missing.
    """
    for source in sources:
        count, (urls, names) = 0, storage.find(source)
        known, out = set(names), leave_out.rstrip("/") + "/"
        for url, below in zip(urls, names, strict=True):
            suffix = PurePosixPath(below).suffix.lower()
            if PurePosixPath(below).name.startswith(".") or (leave_out and url.startswith(out)):
                continue
            if below.lower().endswith((".tar.gz", ".tgz", ".tar.zst")):
                raise LoftUpError(f"{url} is compressed, so that no picture can be read by itself; unpack it to a .tar")
            if suffix == ".parquet" and f"{below[: -len(suffix)]}.tar" in known:
                continue
            if suffix in IMAGE_SUFFIXES or (storage.is_remote(source) and url == source and suffix not in SHARDS):
                found: Iterator[Place] = iter([Place(below, url)])
            elif suffix in SHARDS:
                found = SHARDS[suffix](url, below, column, len(urls) == 1)
            else:
                continue
            for place in found:
                count += 1
                yield place
        if not count:
            kinds = ", ".join(sorted({*IMAGE_SUFFIXES, *SHARDS}))
            raise LoftUpError(f"no pictures in {source}; looked for {kinds}")


def _in_tar(url: str, below: str, column: str | None, alone: bool) -> Iterator[Place]:
    with storage.open_binary(url) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.isfile() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        yield Place(f"{below}/{member.name}", url, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise LoftUpError(f"cannot read {url} as a tar: {one_line(error)}; pack it again") from error


def _in_parquet(url: str, below: str, column: str | None, alone: bool) -> Iterator[Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_binary(url) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise LoftUpError(f"cannot read {url} as Parquet: {one_line(error)}") from error
        schema = file.schema_arrow
        if b"loftup" in (schema.metadata or {}):
            return
        usual = [name for name in (*BYTES, *LINKS) if name in schema.names]
        name = column or next(iter(usual), None)
        if name is None and not alone:
            return
        if name is None or name not in schema.names:
            raise LoftUpError(
                f"{url} has the columns {', '.join(schema.names)}, none of them {column or 'of pictures by its name'}; "
                "name one that holds bytes, a struct with bytes, or links: column="
            )
        kind = schema.field(name).type
        links = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not links and not _holds_bytes(kind):
            raise LoftUpError(f"the column {name} of {url} is {kind}; expected bytes, a struct with bytes, or links")
        for group in range(file.num_row_groups):
            if not links:
                for row in range(file.metadata.row_group(group).num_rows):
                    yield Place(f"{below}/{group:04d}-{row:06d}", url, group=group, row=row, column=name)
                continue
            for row, link in enumerate(file.read_row_group(group, columns=[name])[name].to_pylist()):
                yield Place(f"{below}/{group:04d}-{row:06d}", link or "", column=name)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


SHARDS = {".tar": _in_tar, ".parquet": _in_parquet}


def contents(places: Sequence[Place]) -> list["bytes | OSError"]:
    """The bytes of pictures' files, in order; an error in the place of what cannot be read."""
    if any(storage.is_remote(place.url) and place.group < 0 for place in places):
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(_content, places))
    return list(map(_content, places))


@lru_cache(maxsize=1)
def _row_group(url: str, group: int, column: str) -> Any:
    """A column of a row group; the last one is kept, as the next pictures are mostly in it too."""
    import pyarrow.parquet as pq

    try:
        with storage.open_binary(url) as stream:
            return pq.ParquetFile(stream).read_row_group(group, columns=[column])[column]
    except Exception as error:  # pyarrow's errors are of several classes
        raise OSError(f"cannot read row group {group} of {url}: {one_line(error)}") from error


def _content(place: Place) -> "bytes | OSError":
    try:
        if place.group < 0:
            if place.column and not storage.is_remote(place.url):  # a list from elsewhere opens no files here
                raise OSError(f"the link {place.url!r} is no URL such as https://...")
            return storage.read(place.url, max(0, place.offset), place.length)
        value = _row_group(place.url, place.group, place.column)[place.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise OSError(f"row {place.row} of row group {place.group} of {place.url} holds no bytes")
        return bytes(value)
    except OSError as error:
        return error
