"""Arrays as bytes and back, and rows of them as the bytes of a shard; the layout is described in docs/scale.md."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..version import __version__
from .settings import SCHEMA

__all__ = ["SUFFIX", "decode_array", "encode_array", "read_all", "read_rows", "row_counts", "shard"]

Row = dict[str, Any]
SUFFIX = {"parquet": ".parquet", "webdataset": ".tar"}
ROWS = 16  # of a row group: what a reader of a single row loads
CHANNELS = {"points": 1, "regions": 1}  # the axis of the channels; 0 elsewhere
STEPS = 255
EXACT = {"labels"}


def encode_array(name: str, values: np.ndarray, store: str) -> Row:
    """The columns of an array: its bytes (little-endian, C order) and shape, and for "uint8" what undoes it.

    With "uint8" every channel c has the value ``offset[c] + scale[c] * byte``, from its least to its greatest value in
    the picture; ``error`` is the root mean square of the differences over that of the values.

    Raises:
        ValueError: values are not finite, or beyond what float16 holds.
    """
    row: Row = {name + "_shape": list(values.shape)}
    if name in EXACT:
        return row | {name: values.tobytes()}
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite")
    if store == "float16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise ValueError(f"{name} reach {np.abs(values).max():.3g}, beyond what float16 holds; use store='uint8'")
        return row | {name: half.tobytes()}
    axis = CHANNELS.get(name, 0)
    matrix = np.moveaxis(values.astype(np.float32, copy=False), axis, 0)
    matrix = matrix.reshape(len(matrix), -1)
    low = matrix.min(1, initial=np.inf) if matrix.size else np.zeros(len(matrix), np.float32)
    high = matrix.max(1, initial=-np.inf) if matrix.size else low
    scale = (high - low) / np.float32(STEPS)
    steps = (matrix - low[:, None]) / np.where(scale > 0, scale, 1)[:, None]
    whole = np.clip(np.rint(steps), 0, STEPS)
    wrong = low[:, None] + scale[:, None] * whole - matrix
    norm = float(np.square(matrix, dtype=np.float64).sum())
    error = (float(np.square(wrong, dtype=np.float64).sum()) / norm) ** 0.5 if norm else 0.0
    order = [len(matrix), *np.delete(values.shape, axis)]
    stored = np.ascontiguousarray(np.moveaxis(whole.astype(np.uint8).reshape(order), 0, axis))
    parts = {"scale": scale.tolist(), "offset": low.tolist(), "error": error}
    return row | {name: stored.tobytes()} | {f"{name}_{part}": value for part, value in parts.items()}


def decode_array(name: str, row: Mapping[str, Any]) -> np.ndarray:
    """The array that :func:`encode_array` made columns of; float32, or the whole numbers of labels."""
    shape, content = tuple(row[name + "_shape"]), row[name]
    if name in EXACT:
        width = len(content) // max(1, int(np.prod(shape)))
        return np.frombuffer(content, np.uint8 if width <= 1 else "<u2").reshape(shape)
    if row.get(name + "_scale") is None:
        return np.frombuffer(content, "<f2").reshape(shape).astype(np.float32)
    around = [1] * len(shape)
    around[CHANNELS.get(name, 0)] = -1
    scale, offset = (np.asarray(row[f"{name}_{part}"], np.float32).reshape(around) for part in ("scale", "offset"))
    return offset + scale * np.frombuffer(content, np.uint8).reshape(shape)


def shard(rows: Sequence[Row], settings: Mapping[str, Any], networks: Mapping[str, Any], number: int) -> bytes:
    """The bytes of a shard in the format of the settings; equal rows give equal bytes."""
    facts = {
        "schema": SCHEMA,
        "loftup_version": __version__,
        "part": number,
        "networks": dict(networks),
        "settings": dict(settings),
    }
    if settings["format"] == "webdataset":
        return _tar(rows, facts, number)
    return parquet(rows, _schema(settings), {"loftup": json.dumps(facts, sort_keys=True)}, ROWS)


def parquet(rows: Sequence[Row], schema: Any, facts: Mapping[str, str], group: int | None = None) -> bytes:
    """Rows as Parquet, in row groups of ``group``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema.with_metadata(dict(facts)))
    stream = io.BytesIO()
    heavy = [name for name in schema.names if schema.field(name).type == pa.binary()]
    packed = {name: "none" if name in heavy else "zstd" for name in schema.names}
    dictionary = [name for name in ("url", "column") if name in schema.names]
    pq.write_table(table, stream, group, compression=packed, use_dictionary=dictionary, write_statistics=["key"])
    return stream.getvalue()


def _schema(settings: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    fields = [pa.field("key", pa.string(), nullable=False), pa.field("url", pa.string())]
    fields += [pa.field(name, pa.int64()) for name in ("offset", "length")]
    fields += [pa.field(name, pa.int32()) for name in ("group", "row")]
    fields += [pa.field("column", pa.string())]
    fields += [pa.field(name, pa.int32(), nullable=False) for name in ("height", "width")]
    for name in settings["save"]:
        if name == "pooled":
            fields.append(pa.field(name, pa.list_(pa.float32())))
            continue
        fields += [pa.field(name, pa.binary()), pa.field(name + "_shape", pa.list_(pa.int32()))]
        if name == "regions":
            fields += [pa.field("regions_labels", pa.list_(pa.int32()))]
            fields += [pa.field("regions_pixels", pa.list_(pa.int64()))]
        if settings["store"] == "uint8" and name not in EXACT:
            fields += [pa.field(f"{name}_{part}", pa.list_(pa.float32())) for part in ("scale", "offset")]
            fields += [pa.field(name + "_error", pa.float32())]
    if settings["images"]:
        fields.append(pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    return pa.schema(fields)


def _tar(rows: Sequence[Row], facts: Mapping[str, Any], number: int) -> bytes:
    """A WebDataset shard: of each picture a ``.json``, and a ``.npy`` for every array."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for index, row in enumerate(rows):
            key, plain = f"{number:06d}{index:06d}", dict(row)
            arrays = [name for name in row if f"{name}_shape" in row]
            for name in arrays:
                content, shape = plain.pop(name), plain.pop(name + "_shape")
                count = max(1, int(np.prod(shape)))
                kinds = {1: "u1", 2: "<u2" if name in EXACT else "<f2"}
                array = np.frombuffer(content, kinds[max(1, len(content) // count)]).reshape(shape)
                buffer = io.BytesIO()
                np.save(buffer, array)
                add(f"{key}.{name}.npy", buffer.getvalue())
            if "image" in plain:
                add(f"{key}.image.jpg", plain.pop("image")["bytes"])
            add(f"{key}.json", json.dumps(plain | {"loftup": facts if index == 0 else {}}, sort_keys=True).encode())
    return stream.getvalue()


def row_counts(content: Any, form: str) -> int:
    """The number of rows of a shard, a seekable stream."""
    if form == "parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(content).metadata.num_rows)
    with tarfile.open(fileobj=content, mode="r:") as archive:
        return sum(member.name.endswith(".json") for member in archive)


def read_rows(content: Any, form: str, index: int) -> tuple[int, list[Row]]:
    """Rows around one of a shard, a seekable stream: the number of the first of them, and the rows."""
    if form == "parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(content)
        group = index // ROWS
        return group * ROWS, file.read_row_group(group).to_pylist()
    return 0, read_all(content, form)


def read_all(content: Any, form: str) -> list[Row]:
    """All rows of a shard, a seekable stream."""
    if form == "parquet":
        import pyarrow.parquet as pq

        return list(pq.ParquetFile(content).read().to_pylist())
    rows: dict[str, Row] = {}
    with tarfile.open(fileobj=content, mode="r:") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            key, name = member.name.split(".", 1)
            row, data = rows.setdefault(key, {}), stream.read()
            if name == "json":
                row |= {column: value for column, value in json.loads(data).items() if column != "loftup"}
            elif name == "image.jpg":
                row["image"] = {"bytes": data}
            else:
                array = np.load(io.BytesIO(data), allow_pickle=False)
                row |= {name[:-4]: array.tobytes(), f"{name[:-4]}_shape": list(array.shape)}
    return [rows[key] for key in sorted(rows)]
