"""SA-1B's tar files, read at any place."""

import gzip
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from material import drawn_scene
from torch.utils.data import DataLoader

from loftup import LoftUpError
from loftup.train.data.sa1b import annotate
from loftup.train.data.shards import SA1BShards
from loftup.train.data.sources import UnreadableError

SIZE = (12, 16)


def members(number, prefix=""):
    """A drawn picture and its json, whose mask is the first ``number`` rows."""
    stream = io.BytesIO()
    drawn_scene(*SIZE).save(stream, "PNG")
    mask = np.zeros(SIZE, dtype=bool)
    mask[:number] = True
    found = {"image": {"height": 12, "width": 16, "file_name": f"sa_{number}.jpg"}, "annotations": annotate([mask])}
    return {f"{prefix}sa_{number}.jpg": stream.getvalue(), f"{prefix}sa_{number}.json": json.dumps(found).encode()}


def pack(path, files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Three shards: plain members, members in a folder and out of order, a long name."""
    pack(tmp_path / "sa_000000.tar", members(1) | members(2))
    second = members(3, "./") | members(4, "./")
    pack(tmp_path / "sa_000001.tar", {name: second[name] for name in sorted(second, key=lambda name: name[::-1])})
    pack(tmp_path / "deep" / "sa_000002.tar", members(5, "x" * 120 + ".y/"))
    return tmp_path


def read(source):
    pictures = [source.read(index, torch.Generator()) for index in range(len(source))]
    return {picture.name: int(picture.masks.crop((0, 0, *SIZE), SIZE).sum()) // 16 for picture in pictures}


def test_every_member_is_found(shards):
    source = SA1BShards(shards)
    long = "x" * 120 + ".y"
    assert read(source) == {
        f"deep/sa_000002.tar/{long}/sa_5": 5,
        "sa_000000.tar/sa_1": 1,
        "sa_000000.tar/sa_2": 2,
        "sa_000001.tar/sa_3": 3,
        "sa_000001.tar/sa_4": 4,
    }
    image = torch.from_numpy(np.array(drawn_scene(*SIZE))).movedim(-1, 0)
    assert torch.equal(source.read(3, torch.Generator()).image, image)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"no picture {index}, there are 5"):
            source.read(index, torch.Generator())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("sa_000000.tar", {"sa_000000.tar/sa_1": 1, "sa_000000.tar/sa_2": 2}),
        ("sa_*1.tar", {"sa_000001.tar/sa_3": 3, "sa_000001.tar/sa_4": 4}),
        ("sa_00000[0].tar", {"sa_000000.tar/sa_1": 1, "sa_000000.tar/sa_2": 2}),
        ("sa_{000000..000001}.tar", {f"sa_00000{n // 2}.tar/sa_{n + 1}": n + 1 for n in range(4)}),
    ],
)
def test_patterns(shards, pattern, expected):
    assert read(SA1BShards(f"{shards}/{pattern}")) == expected


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_the_same(shards, context):
    loader = DataLoader(
        Named(SA1BShards(shards)), batch_size=None, shuffle=True, num_workers=1, multiprocessing_context=context
    )
    assert dict(loader) == read(SA1BShards(shards))


class Named:
    """Names and heights of masks by number."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        picture = self.source.read(index, torch.Generator())
        return picture.name, int(picture.masks.crop((0, 0, *SIZE), SIZE).sum()) // 16


def test_members_without_a_partner_are_said(shards, caplog):
    first, second = members(6), members(7)
    first.pop("sa_6.json")
    second.pop("sa_7.jpg")
    pack(
        shards / "more.tar",
        first | second | members(8) | {"README": b"hello", "notes.txt": b"hello", "._sa_8.jpg": b""},
    )
    assert list(read(SA1BShards(shards / "more.tar"))) == ["more.tar/sa_8"]
    assert "more.tar: left out 2 members without a partner (picture or json)" in caplog.text
    pack(shards / "none.tar", first)
    with pytest.raises(
        LoftUpError, match=r"no picture in .*none.tar has a json .*: 1 tar files, 1 members without a p"
    ):
        SA1BShards(shards / "none.tar")


def test_shards_that_cannot_be_used_are_named(shards, tmp_path):
    with pytest.raises(LoftUpError, match=r"no tar file .*nowhere.tar$"):
        SA1BShards(tmp_path / "nowhere.tar")
    with pytest.raises(LoftUpError, match=r"no tar file .*sa_000002.tar and 2 more"):
        SA1BShards(f"{tmp_path}/sa_{{000001..000004}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoftUpError, match=r"no tar files in the folder .*empty"):
        SA1BShards(tmp_path / "empty")
    content = (tmp_path / "sa_000000.tar").read_bytes()
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(content))
    (tmp_path / "cut.tar").write_bytes(content[:700])
    for name in ("zipped", "cut"):
        with pytest.raises(LoftUpError, match=rf"cannot read .*{name}.tar as a tar file: truncated, compressed or dam"):
            SA1BShards(tmp_path / f"{name}.tar")
    pack(tmp_path / "twice.tar", members(1) | {"sa_1.png": b""})
    with pytest.raises(LoftUpError, match=r"twice.tar holds two picture members for sa_1; expected one"):
        SA1BShards(tmp_path / "twice.tar")


def test_a_missing_webdataset_names_the_extra(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(LoftUpError, match=r'tar files need webdataset: pip install "loftup\[train\]"'):
        SA1BShards(shards)


def test_damaged_members_are_named(shards, tmp_path):
    broken = members(1) | members(2)
    broken["sa_1.jpg"] = b"x"
    broken["sa_2.json"] = b"{"
    source = SA1BShards(pack(tmp_path / "broken.tar", broken))
    with pytest.raises(UnreadableError, match=r"cannot read the image .*broken.tar/sa_1: "):
        source.read(0, torch.Generator())
    with pytest.raises(UnreadableError, match=r"cannot read .*broken.tar/sa_2.json as SA-1B's annotations"):
        source.read(1, torch.Generator())
    (tmp_path / "broken.tar").write_bytes((tmp_path / "broken.tar").read_bytes()[:100])
    with pytest.raises(UnreadableError, match=r"cannot read .*broken.tar/sa_1: the tar file ends 1 bytes early"):
        source.read(0, torch.Generator())
    (tmp_path / "broken.tar").unlink()
    with pytest.raises(UnreadableError, match=r"cannot read .*broken.tar/sa_1: .*No such file"):
        source.read(0, torch.Generator())


def test_pictures_of_no_known_range_are_unreadable(tmp_path):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("F", (16, 12)).save(stream, "TIFF")
    source = SA1BShards(pack(tmp_path / "x.tar", members(1) | {"sa_1.jpg": stream.getvalue()}))
    with pytest.raises(UnreadableError, match=r"x.tar/sa_1 has mode 'F', whose values have no fixed range"):
        source.read(0, torch.Generator())
