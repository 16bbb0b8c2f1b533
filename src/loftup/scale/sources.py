"""Where the pictures are: folders, WebDataset tars, and Parquet with image bytes or links."""

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def list_pictures(sources: Sequence[str], column: str | None = None) -> Iterator[Place]:
    """All pictures of some sources, in a fixed order.

    Args:
        sources: folders (with all below), ``.tar`` files of WebDataset, ``.parquet`` files, or pictures; local or URLs.
        column: of Parquet files that holds the pictures, as bytes, as a struct with ``bytes``, or as links; None looks
            for usual names.

    Raises:
        LoftUpError: a source without pictures, a compressed tar, Parquet without such a column.
        FileNotFoundError: a source is missing.
    """
    for source in sources:
        count = 0
        for url, below in zip(*storage.find(source), strict=True):
            suffix = PurePosixPath(below).suffix.lower()
            if suffix in IMAGE_SUFFIXES or (storage.is_remote(source) and url == source and suffix not in SHARDS):
                found: Iterator[Place] = iter([Place(below, url)])
            elif suffix in SHARDS:
                found = SHARDS[suffix](url, below, column)
            elif below.lower().endswith((".tar.gz", ".tgz", ".tar.zst")):
                raise LoftUpError(f"{url} is compressed, so that no picture can be read by itself; unpack it to a .tar")
            else:
                continue
            for place in found:
                count += 1
                yield place
        if not count:
            kinds = ", ".join(sorted({*IMAGE_SUFFIXES, *SHARDS}))
            raise LoftUpError(f"no pictures in {source}; looked for {kinds}")


def _in_tar(url: str, below: str, column: str | None) -> Iterator[Place]:
    with storage.open_binary(url) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.isfile() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        yield Place(f"{below}/{member.name}", url, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise LoftUpError(f"cannot read {url} as a tar: {one_line(error)}; pack it again") from error


def _in_parquet(url: str, below: str, column: str | None) -> Iterator[Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_binary(url) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise LoftUpError(f"cannot read {url} as Parquet: {one_line(error)}") from error
        schema = file.schema_arrow
        usual = [name for name in (*BYTES, *LINKS) if name in schema.names]
        name = column or next(iter(usual), None)
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
    rows: dict[tuple[str, int], Any] = {}
    for place in places:
        if place.group >= 0 and (place.url, place.group) not in rows:
            rows[place.url, place.group] = _row_group(place)
    if any(storage.is_remote(place.url) for place in places):
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda place: _content(place, rows), places))
    return [_content(place, rows) for place in places]


def _row_group(place: Place) -> Any:
    import pyarrow.parquet as pq

    try:
        with storage.open_binary(place.url) as stream:
            return pq.ParquetFile(stream).read_row_group(place.group, columns=[place.column])[place.column]
    except Exception as error:  # pyarrow's errors are of several classes
        return OSError(f"cannot read row group {place.group} of {place.url}: {one_line(error)}")


def _content(place: Place, rows: dict[tuple[str, int], Any]) -> "bytes | OSError":
    try:
        if place.group < 0:
            if not place.url:
                raise OSError("the link is empty")
            return storage.read(place.url, max(0, place.offset), place.length)
        column = rows[place.url, place.group]
        if isinstance(column, OSError):
            return column
        value = column[place.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise OSError(f"row {place.row} of row group {place.group} of {place.url} holds no bytes")
        return bytes(value)
    except OSError as error:
        return error
