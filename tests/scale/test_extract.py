"""Extractions by one process: what they hold, how they go on, how they fail."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from photos import QUICK, jpeg, photos
from safetensors.torch import save_file

import loftup
from loftup import LoftUpError
from loftup.scale import Settings, extract, storage
from loftup.scale.compute import grid_points


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("album") / "photos")


def data(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def test_features_are_those_of_the_backbone(album, tmp_path):
    summary = extract(album, tmp_path / "out", **QUICK, save=("features", "pooled"))
    assert (summary.pictures, summary.written, summary.failed) == (10, 10, 0)
    features = loftup.open(tmp_path / "out")
    assert len(features) == 10
    assert len(data(tmp_path / "out")) == 3
    backbone, up = loftup.load_backbone("tiny"), loftup.LoftUp.from_pretrained("any")
    for record in (features[0], features[-1]):
        small = tuple(round(side * 60 / min(record.size)) for side in record.size)
        image = backbone.preprocess(album / record.key, size=small)
        expected = backbone(image)[0]
        assert record.features.shape == expected.shape
        assert (record.features - expected).norm() < 0.01 * expected.norm()
        assert torch.allclose(record.pooled, expected.mean((1, 2)), atol=0.02 * float(expected.abs().max()))
        guidance = backbone.preprocess(album / record.key, size=(33, 44))
        dense = record.dense((33, 44))
        wanted = up(record.features[None], guidance)[0]
        assert (dense - wanted).norm() < 0.01 * wanted.norm()
    assert features[2:4][1].key == features[3].key
    assert [record.key for record in features] == sorted(record.key for record in features)
    with pytest.raises(IndexError):
        features[10]
    with pytest.raises(AttributeError, match="no 'points'; it has"):
        _ = features[0].points


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_every_output(album, tmp_path, form):
    torch.manual_seed(0)
    head = {"weight": torch.randn(5, 192, 1, 1), "bias": torch.randn(5)}
    save_file(head, tmp_path / "head.safetensors")
    kinds = ("features", "points", "logits", "labels", "dense")
    options = {
        "save": kinds,
        "points": (2, 3),
        "head": str(tmp_path / "head.safetensors"),
        "images": True,
        "format": form,
    }
    extract(album, tmp_path / "out", **QUICK, **options)
    record = loftup.open(tmp_path / "out")[5]
    dense = record.dense((40, 48), backend="torch")  # made now
    stored = torch.from_numpy(np.frombuffer(record.row["dense"], "<f2").reshape(192, 40, 48).astype(np.float32))
    assert (dense - stored).norm() < 0.05 * stored.norm()  # the stored picture is a JPEG
    assert torch.equal(record.dense(), stored)
    x, y = grid_points(2, 3, 40, 48).T
    assert record.points.shape == (6, 192)
    corners = stored[:, y.floor().long(), x.floor().long()]
    assert (record.points.T - corners).norm() < 0.5 * corners.norm()
    logits = torch.einsum("kc,chw->khw", head["weight"][..., 0, 0], stored) + head["bias"][:, None, None]
    assert (record.logits - logits).norm() < 0.02 * logits.norm()
    assert (record.labels == record.logits.argmax(0)).float().mean() > 0.99
    assert record.picture().shape == (3, 40, 48)


def test_regions_are_means_of_the_dense_map(album, tmp_path):
    from PIL import Image

    labels = np.full((60, 80), 7, np.uint8)
    labels[:, 30:], labels[40:], labels[:, 70:] = 2, 200, 255
    for file in album.rglob("*.jpg"):
        target = (tmp_path / "masks" / file.relative_to(album)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
    (tmp_path / "masks" / "001.png").unlink()
    options = {"save": ("dense", "regions"), "masks": str(tmp_path / "masks")}
    summary = extract(album, tmp_path / "out", **QUICK, **options)
    assert summary.failed == 1
    assert "001.png" in loftup.open(tmp_path / "out").errors()[0]["error"]
    record = loftup.open(tmp_path / "out")[0]
    assert record.row["regions_labels"] == [2, 7, 200]
    assert sum(record.row["regions_pixels"]) == 40 * 42  # without the void
    dense = torch.from_numpy(np.frombuffer(record.row["dense"], "<f2").reshape(192, 40, 48).astype(np.float32))
    wanted = dense[:, :20, :15].mean((1, 2))  # label 7 and no others
    assert (record.regions[1] - wanted).norm() < 0.3 * wanted.norm()
    assert record.regions.shape == (3, 192)


def test_stored_maps_have_one_size(album, tmp_path):
    extract(album, tmp_path / "out", **QUICK, save=("dense",))
    record = loftup.open(tmp_path / "out")[0]
    assert record.dense().shape == (192, 40, 48)
    with pytest.raises(LoftUpError, match="holds dense, no features to upsample to 9x9; extract with features in save"):
        record.dense(9)


def test_uint8_states_its_error(album, tmp_path):
    extract(album, tmp_path / "a", **QUICK)
    extract(album, tmp_path / "b", **QUICK, store="uint8")
    exact, coarse = loftup.open(tmp_path / "a")[4], loftup.open(tmp_path / "b")[4]
    error = float((exact.features - coarse.features).norm() / exact.features.norm())
    assert error == pytest.approx(coarse.row["features_error"], rel=0.1)
    assert error < 0.01


def test_it_goes_on_where_it_was_killed(album, tmp_path):
    whole = tmp_path / "whole"
    extract(album, whole, **QUICK)
    words = [str(album), "-o", str(tmp_path / "killed"), "--backbone", "tiny", "--weights", "any", "--input", "64"]
    words += ["--size", "40", "48", "--part", "4", "--format", "parquet", "--device", "cpu"]
    command = [sys.executable, "-m", "loftup", "features", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (tmp_path / "killed" / "plan").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "killed" / "data").mkdir(exist_ok=True)
    (tmp_path / "killed" / "data" / (".loftup." + "0" * 16)).write_bytes(b"half")
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert set(data(tmp_path / "killed")) == set(data(whole))
    again = extract(album, whole, **QUICK)
    assert (again.written, len(again.parts)) == (10, 0)


def test_new_pictures_get_parts_of_their_own(tmp_path):
    folder = photos(tmp_path / "photos", 5)
    extract(folder, tmp_path / "out", **QUICK)
    before = data(tmp_path / "out")
    (folder / "000-new.jpg").write_bytes(jpeg(77))
    summary = extract(folder, tmp_path / "out", **QUICK)
    after = data(tmp_path / "out")
    assert (summary.pictures, sum(part["pictures"] for part in summary.parts)) == (6, 1)
    assert {name: after[name] for name in before} == before
    assert loftup.open(tmp_path / "out")[5].key == "000-new.jpg"


def test_damaged_pictures_are_named_and_tried_again(tmp_path):
    folder = photos(tmp_path / "photos", 6)
    good = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(good[:300])
    (folder / "005.jpg").write_bytes(b"")
    summary = extract(folder, tmp_path / "out", **QUICK)
    assert (summary.pictures, summary.written, summary.failed) == (6, 4, 2)
    features = loftup.open(tmp_path / "out")
    assert [row["key"] for row in features.errors()] == ["004.jpg", "005.jpg"]
    assert "cannot read the image 004.jpg" in features.errors()[0]["error"]
    assert len(features) == 4
    (folder / "004.jpg").write_bytes(good)
    assert extract(folder, tmp_path / "out", **QUICK).failed == 2  # told, not tried
    assert extract(folder, tmp_path / "out", **QUICK, retry_errors=True).failed == 1
    (folder / "005.jpg").write_bytes(good)
    assert extract(folder, tmp_path / "out", **QUICK, retry_errors=True).failed == 0
    assert not list((tmp_path / "out" / "errors").iterdir())


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_retry_keeps_what_is_good(tmp_path, monkeypatch, form):
    """Whatever is away meanwhile, and wherever it is killed."""
    folder, options = photos(tmp_path / "photos", 6), {**QUICK, "format": form}
    good = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(b"")
    extract(folder, tmp_path / "out", **options)
    (folder / "001.jpg").rename(tmp_path / "away.jpg")
    (folder / "004.jpg").write_bytes(good)
    write = storage.write_atomically

    def killed(path, content):
        if path.parent.name == "data":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tmp_path / "out", **options, retry_errors=True)
    monkeypatch.undo()
    assert len(loftup.open(tmp_path / "out").errors()) == 1
    assert extract(folder, tmp_path / "out", **options, retry_errors=True).written == 6
    (tmp_path / "away.jpg").rename(folder / "001.jpg")
    extract(folder, tmp_path / "whole", **options)
    assert data(tmp_path / "out") == data(tmp_path / "whole")
    assert loftup.open(tmp_path / "out").errors() == []


def test_errors_of_a_killed_try_are_forgotten_where_the_next_has_none(tmp_path, monkeypatch):
    folder, write = photos(tmp_path / "photos", 3), storage.write_atomically
    good = (folder / "001.jpg").read_bytes()
    (folder / "001.jpg").write_bytes(b"")

    def killed(path, content):
        if path.parent.name == "data":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tmp_path / "out", **QUICK)
    monkeypatch.undo()
    assert (tmp_path / "out" / "errors" / "part-000000.parquet").exists()
    (folder / "001.jpg").write_bytes(good)
    summary = extract(folder, tmp_path / "out", **QUICK)
    assert (summary.written, summary.failed, len(loftup.open(tmp_path / "out"))) == (3, 0, 3)


def test_a_folder_made_anew_has_the_new_plan(tmp_path):
    first, second = photos(tmp_path / "first", 2), photos(tmp_path / "second", 3)
    extract(first, tmp_path / "out", **QUICK)
    shutil.rmtree(tmp_path / "out")
    extract(second, tmp_path / "out", **QUICK)
    assert [str(tmp_path / "second") in record.place.url for record in loftup.open(tmp_path / "out")] == 3 * [True]


def test_an_output_within_its_source(tmp_path):
    folder = photos(tmp_path / "photos", 3)
    for _ in range(2):
        assert extract(folder, folder / "features", **QUICK, images=True).pictures == 3


def test_a_part_that_fails_whole_ends_the_run(tmp_path):
    folder = photos(tmp_path / "photos", 18)
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"x")
    with pytest.raises(LoftUpError, match="all 18 pictures of part 0 failed, the first of them: .*is a disk or a GPU"):
        extract(folder, tmp_path / "out", **{**QUICK, "part": 18})
    assert loftup.open(tmp_path / "out").errors() == []


def test_relative_places_are_found_from_elsewhere(tmp_path, monkeypatch):
    photos(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    extract("photos", "out", **QUICK)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert loftup.open(tmp_path / "out")[0].dense(8).shape == (192, 8, 8)


def test_more_than_was_agreed_to(album, tmp_path):
    with pytest.raises(LoftUpError, match=r"10 pictures: about 0\.1 MB, more than the 0\.0 MB that are agreed to"):
        extract(album, tmp_path / "out", **QUICK, most=1000)


def test_a_full_disk_loses_nothing(album, tmp_path, monkeypatch):
    write, count = storage.write_atomically, []

    def full(path, content):
        if path.parent.name == "data" and (count.append(1) or len(count) == 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        extract(album, tmp_path / "out", **QUICK)
    monkeypatch.undo()
    assert extract(album, tmp_path / "out", **QUICK).written == 10
    extract(album, tmp_path / "whole", **QUICK)
    assert data(tmp_path / "out") == data(tmp_path / "whole")


def test_a_picture_that_the_networks_refuse_fails_alone(album, tmp_path, monkeypatch):
    from loftup.scale.compute import Extractor

    batch = Extractor._batch

    def picky(self, pictures):
        if any(each.place.key == "004.jpg" for each in pictures):
            raise RuntimeError("out of memory")
        return batch(self, pictures)

    monkeypatch.setattr(Extractor, "_batch", picky)
    summary = extract(album, tmp_path / "out", **QUICK)
    assert (summary.written, summary.failed) == (9, 1)
    assert loftup.open(tmp_path / "out").errors()[0]["error"] == "out of memory"


def test_other_settings_and_other_folders_are_refused(album, tmp_path):
    extract(album, tmp_path / "out", **QUICK)
    with pytest.raises(LoftUpError, match="other settings .*store 'float16', now 'uint8'"):
        extract(album, tmp_path / "out", **QUICK, store="uint8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(LoftUpError, match=r"holds letter\.txt, which loftup did not make"):
        extract(album, tmp_path / "mine", **QUICK)
    with pytest.raises(LoftUpError, match="has no manifest"):
        loftup.open(tmp_path / "mine")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(LoftUpError, match="is damaged"):
        loftup.open(tmp_path / "out")
    photos(tmp_path / "a", 2)
    photos(tmp_path / "b", 2)
    with pytest.raises(LoftUpError, match="two pictures have the name"):
        extract([tmp_path / "a", tmp_path / "b"], tmp_path / "both", **QUICK)


def test_object_storage_holds_an_output(album, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://bucket/{tmp_path.name}"
    assert extract(album, url, **QUICK).written == 10
    assert extract(album, url, **QUICK).parts == ()
    extract(album, tmp_path / "out", **QUICK)
    for name, content in data(tmp_path / "out").items():
        assert fsspec.filesystem("memory").cat_file(f"{url}/data/{name}") == content
    assert loftup.open(url)[3].dense((20, 20)).shape == (192, 20, 20)


def test_a_source_that_is_gone_is_told(tmp_path):
    folder = photos(tmp_path / "photos", 2)
    extract(folder, tmp_path / "out", **QUICK)
    for file in folder.rglob("*.jpg"):
        file.unlink()
    with pytest.raises(OSError, match="bring it back, or extract with images=True"):
        loftup.open(tmp_path / "out")[0].dense(10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save": ("feature",)}, "did you mean 'features'"),
        ({"save": ()}, "one output or more"),
        ({"save": ("points",)}, "needs points, got None"),
        ({"points": (2, 2)}, "save has none of points"),
        ({"store": "int4"}, "store must be one of float16, uint8, got 'int4'"),
        ({"batch": 0}, "batch must be a positive whole number"),
        ({"size": (0, 3)}, "size must be two positive"),
    ],
)
def test_settings_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        Settings(**options)


def test_heads_are_checked(tmp_path):
    save_file({"weight": torch.zeros(3, 7)}, tmp_path / "narrow.safetensors")
    save_file({"kernel": torch.zeros(3, 192)}, tmp_path / "other.safetensors")
    options = {**QUICK, "save": ("logits",)}
    with pytest.raises(LoftUpError, match="takes 7 channels, the backbone 'tiny' gives 192"):
        extract(tmp_path, tmp_path / "out", **options, head=str(tmp_path / "narrow.safetensors"))
    with pytest.raises(LoftUpError, match="holds kernel"):
        extract(tmp_path, tmp_path / "out", **options, head=str(tmp_path / "other.safetensors"))


def test_the_manifest_counts(album, tmp_path):
    extract(album, tmp_path / "out", **QUICK)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["pictures"], manifest["written"], manifest["failed"]) == (10, 10, 0)
    assert (manifest["parts"], manifest["finished_parts"]) == (3, 3)
    assert len(manifest["networks"]["backbone_sha256"]) == 16
