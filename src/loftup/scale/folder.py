"""The output folder: its plan, its manifest, and which parts are finished.

- ``manifest.json``: settings, fingerprints of the weights, counts. It makes the folder loftup's.
- ``plan/00000.parquet``: the pictures, each with its part; a file for every start that found new ones, or more of them.
- ``data/part-000000.parquet``: a shard, the rows of a part. It appears whole, and says that the part is finished.
- ``errors/part-000000.parquet``: the pictures of a part that failed. It is written before the shard.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import LoftUpError
from ..files import MADE_BY
from ..version import __version__
from . import storage
from .codec import SUFFIX, parquet, read_all
from .settings import Settings
from .sources import Place

__all__ = ["Folder"]

CHUNK = 100_000  # pictures of a file of the plan
MANIFEST = "manifest.json"


class Folder:
    """An output folder, local or on object storage.

    Args:
        url: of the folder.
        settings: of the extraction.

    Raises:
        LoftUpError: it was made with other settings, or holds files of others.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url, self.settings = url, settings
        self.suffix = SUFFIX[settings.format]

    def file(self, *parts: str) -> str:
        """The URL of a file in it."""
        return storage.join(self.url, *parts)

    # Manifest

    def claim(self, networks: Mapping[str, Any]) -> None:
        """Make the folder this extraction's, or find that it is.

        Raises:
            LoftUpError: see the class.
        """
        _remembered.cache_clear()
        now = self.settings.as_json()
        if storage.exists(self.file(MANIFEST)):
            before = read_manifest(self.url)
            old = {**before["settings"], **before["networks"]}
            new = {**now, **networks}
            differences = [
                f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in new | old if old.get(key) != new.get(key)
            ]
            if differences:
                raise LoftUpError(
                    f"{self.url} was made with other settings ({'; '.join(differences)}); give another -o"
                )
            return
        if others := [name for name in storage.names(self.url) if not name.startswith(".loftup.")]:
            raise LoftUpError(
                f"{self.url} holds {', '.join(others[:4])}, which loftup did not make; give a new or an empty folder"
            )
        self.write_manifest(networks, {})

    def write_manifest(self, networks: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Write settings, weights and counts."""
        manifest = {
            "made_by": MADE_BY,
            "loftup_version": __version__,
            **counts,
            "networks": dict(networks),
            "settings": self.settings.as_json(),
        }
        storage.write(self.file(MANIFEST), (json.dumps(manifest, indent=2) + "\n").encode())

    # Plan

    def plan(self, pictures: Iterable[Place], part: int) -> int:
        """Add the pictures that are not planned yet, in parts of a size; returns how many are planned in all.

        Raises:
            LoftUpError: two pictures have one key.
        """
        first, known = 0, dict[str, int]()  # key to a hash of where the picture is
        files = [name for name in storage.names(self.file("plan")) if name.endswith(".parquet")]
        for name in files:
            table = _table(self.file("plan", name))
            first = max(first, table["part"][-1].as_py() + 1)
            known.update((place.key, hash(place)) for place in _places(table))
        chunk: list[dict[str, Any]] = []
        for place in pictures:
            if place.key in known:
                if known[place.key] == hash(place):
                    continue
                raise LoftUpError(
                    f"two pictures have the name {place.key}, or it is elsewhere than when it was planned; give "
                    "sources of the same names outputs of their own, and a source that moved a new one"
                )
            known[place.key] = hash(place)
            chunk.append({"part": first + len(chunk) // part, **place._asdict()})
            if len(chunk) == max(part, CHUNK - CHUNK % part):
                files.append(self._write_plan(len(files), chunk))
                first, chunk = chunk[-1]["part"] + 1, []
        if chunk:
            self._write_plan(len(files), chunk)
        return len(known)

    def _write_plan(self, number: int, chunk: Sequence[Mapping[str, Any]]) -> str:
        import pyarrow as pa

        texts, numbers = ("key", "url", "column"), ("part", "offset", "length", "group", "row")
        fields = [(name, pa.int64()) for name in numbers] + [(name, pa.string()) for name in texts]
        name = f"{number:05d}.parquet"
        storage.write(self.file("plan", name), parquet(list(map(dict, chunk)), pa.schema(fields), {"loftup": MADE_BY}))
        return name

    def parts(self) -> Iterator[tuple[int, str, int]]:
        """Number, plan file and number of pictures of every part."""
        for name in storage.names(self.file("plan")):
            counted = _table(self.file("plan", name), ["part"])["part"].value_counts()
            for each in counted.to_pylist():
                yield each["values"], name, each["counts"]

    def places(self, part: int, plan: str) -> list[Place]:
        """The pictures of a part."""
        import pyarrow.compute as pc

        table = _remembered(self.file("plan", plan))
        return list(_places(table.filter(pc.equal(table["part"], part))))

    # Shards

    def finished(self) -> set[int]:
        """The parts whose shards are there."""
        return {_number(name) for name in storage.names(self.file("data")) if name.endswith(self.suffix)}

    def with_errors(self) -> set[int]:
        """The parts some of whose pictures failed."""
        return {_number(name) for name in storage.names(self.file("errors")) if name.endswith(".parquet")}

    def store(self, part: int, content: bytes, errors: Sequence[Mapping[str, Any]], again: bool = False) -> None:
        """Write a shard after its errors; ``again`` where it is there: then it comes first, as it holds more rows."""
        import pyarrow as pa

        shard, failed = self._shard(part), self.file("errors", f"part-{part:06d}.parquet")
        if again:
            storage.write(shard, content)
        if errors:
            schema = pa.schema([(column, pa.string()) for column in ("key", "url", "error")])
            storage.write(failed, parquet(list(map(dict, errors)), schema, {"loftup": MADE_BY}))
        elif storage.exists(failed):  # of a try before, and mended since
            storage.remove(failed)
        if not again:
            storage.write(shard, content)

    def _shard(self, part: int) -> str:
        return self.file("data", f"part-{part:06d}{self.suffix}")

    def rows(self, part: int) -> list[dict[str, Any]]:
        """All rows of a finished part."""
        return read_all(io.BytesIO(storage.read(self._shard(part))), self.settings.format)

    def errors(self, parts: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """The pictures that failed, of some parts or all: key, url, error."""
        rows: list[dict[str, Any]] = []
        for part in sorted(self.with_errors()) if parts is None else parts:
            rows += _table(self.file("errors", f"part-{part:06d}.parquet")).to_pylist()
        return rows


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of a folder; LoftUpError if it has none."""
    try:
        manifest = json.loads(storage.read(storage.join(url, MANIFEST)))
        _ = manifest["settings"], manifest["networks"]
    except FileNotFoundError:
        raise LoftUpError(f"{url} has no {MANIFEST}; expected a folder that loftup.scale.extract made") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LoftUpError(f"{url}/{MANIFEST} is damaged: {error}; extract to another folder") from error
    return dict(manifest)


def _number(name: str) -> int:
    return int(name.removeprefix("part-").partition(".")[0])


def _table(url: str, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(io.BytesIO(storage.read(url))).read(columns)


@lru_cache(maxsize=2)
def _remembered(url: str) -> Any:
    """A file of the plan, which never changes while an extraction lasts."""
    return _table(url)


def _places(table: Any) -> Iterator[Place]:
    columns = [table[name].to_pylist() for name in Place._fields]
    return (Place(*values) for values in zip(*columns, strict=True))
