"""Arrays and rows as bytes."""

import io
import json

import numpy as np
import pytest

from loftup.scale.codec import decode_array, encode_array, read_rows, row_counts, shard
from loftup.scale.settings import Settings


def features(channels=6, height=5, width=7):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(channels, height, width)) * np.arange(1, channels + 1)[:, None, None] + 20).astype(
        np.float32
    )


def test_float16_keeps_what_it_holds():
    values = features()
    back = decode_array("features", encode_array("features", values, "float16"))
    assert back.dtype == np.float32
    assert np.abs(back - values).max() <= np.abs(values).max() * 2**-11


def test_uint8_is_off_by_half_a_step_and_says_by_how_much():
    values = features()
    row = encode_array("features", values, "uint8")
    back = decode_array("features", row)
    assert len(row["features"]) == values.size
    steps = np.ptp(values.reshape(6, -1), axis=1) / 255
    assert (np.abs(back - values).reshape(6, -1).max(1) <= steps * 0.501).all()
    error = np.linalg.norm(back - values) / np.linalg.norm(values)
    assert row["features_error"] == pytest.approx(error, rel=1e-3)
    assert error < 0.005


@pytest.mark.parametrize("store", ["float16", "uint8"])
def test_constant_channels_empty_arrays_and_points(store):
    flat = np.full((3, 2, 2), 7.0, np.float32)
    assert np.array_equal(decode_array("features", encode_array("features", flat, store)), flat)
    none = np.zeros((0, 5), np.float32)
    assert decode_array("points", encode_array("points", none, store)).shape == (0, 5)
    points = features(5, 1, 6)[:, 0].T.copy()  # (6, 5): the channels are last
    back = decode_array("points", encode_array("points", points, store))
    assert back.shape == (6, 5)
    assert np.abs(back - points).max() < 0.1


def test_labels_are_exact():
    for kind, most in (("u1", 255), ("<u2", 40_000)):
        labels = np.array([[0, 1], [2, most]], kind)
        assert np.array_equal(decode_array("labels", encode_array("labels", labels, "uint8")), labels)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="beyond what float16 holds; use store='uint8'"):
        encode_array("features", np.full((1, 1, 1), 1e6, np.float32), "float16")
    with pytest.raises(ValueError, match="not finite"):
        encode_array("features", np.full((1, 1, 1), np.nan, np.float32), "uint8")


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("store", ["float16", "uint8"])
def test_shards_repeat_and_are_read_row_by_row(form, store):
    settings = Settings(save=("features", "pooled"), store=store, format=form).as_json()
    place = {"url": "x", "offset": -1, "length": -1, "group": -1, "row": -1, "column": "", "height": 5, "width": 7}
    rows = [
        {"key": f"{n}.jpg", **place, **encode_array("features", features() + n, store), "pooled": [float(n)] * 3}
        for n in range(20)
    ]
    content = shard(rows, settings, {"backbone": "x"}, 3)
    assert content == shard(rows, settings, {"backbone": "x"}, 3)
    assert row_counts(io.BytesIO(content), form) == 20
    first, near = read_rows(io.BytesIO(content), form, 18)
    row = near[18 - first]
    assert row["key"] == "18.jpg"
    assert row["pooled"] == [18.0] * 3
    assert np.abs(decode_array("features", row) - features() - 18).max() < 0.2


def test_other_tools_read_parquet(tmp_path):
    pandas, polars, duckdb, datasets = map(pytest.importorskip, ("pandas", "polars", "duckdb", "datasets"))
    settings = Settings(save=("features", "pooled")).as_json()
    place = {"url": "x", "offset": -1, "length": -1, "group": -1, "row": -1, "column": "", "height": 5, "width": 7}
    row = {"key": "a.jpg", **place, **encode_array("features", features(), "float16"), "pooled": [1.0, 2.0]}
    file = tmp_path / "part-000000.parquet"
    file.write_bytes(shard([row], settings, {}, 0))
    tables = [
        pandas.read_parquet(file).iloc[0],
        polars.read_parquet(file).to_dicts()[0],
        duckdb.sql(f"select * from '{file}'").to_arrow_table().to_pylist()[0],
        datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))[0],
    ]
    for each in tables:
        array = np.frombuffer(each["features"], np.float16).reshape(tuple(each["features_shape"]))
        assert np.array_equal(array, features().astype(np.float16))
        assert list(each["pooled"]) == [1.0, 2.0]


def test_webdataset_reads_its_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    settings = Settings(format="webdataset").as_json()
    row = {"key": "a.jpg", "url": "x", "height": 5, "width": 7, **encode_array("features", features(), "float16")}
    file = tmp_path / "part-000000.tar"
    file.write_bytes(shard([row], settings, {}, 0))
    (sample,) = list(webdataset.WebDataset(str(file), shardshuffle=False).decode())
    assert np.array_equal(sample["features.npy"], features().astype(np.float16))
    assert sample["json"]["key"] == "a.jpg"


def test_the_schema_says_what_made_it():
    import pyarrow.parquet as pq

    content = shard([], Settings().as_json(), {"backbone_sha256": "abc"}, 7)
    facts = json.loads(pq.ParquetFile(io.BytesIO(content)).schema_arrow.metadata[b"loftup"])
    assert (facts["schema"], facts["part"], facts["networks"]) == (1, 7, {"backbone_sha256": "abc"})
    assert facts["settings"]["save"] == ["features"]
