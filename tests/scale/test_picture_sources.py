"""Pictures in folders, tars, Parquet and behind links."""

import functools
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from photos import jpeg, photos

from loftup import LoftUpError
from loftup.scale import storage
from loftup.scale.decode import decode
from loftup.scale.sources import contents, list_pictures


def tar(path, names):
    with tarfile.open(path, "w") as archive:
        for index, name in enumerate(names):
            for suffix, content in ((".jpg", jpeg(index)), (".json", b"{}")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def parquet(path, columns, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def test_folders_tars_and_parquet_in_one_place(tmp_path):
    photos(tmp_path / "all", 3)
    tar(tmp_path / "all" / "a.tar", ["x", "deep/y"])
    parquet(
        tmp_path / "all" / "b.parquet",
        {"image": [{"bytes": jpeg(n), "path": None} for n in range(5)]},
        row_group_size=2,
    )
    (tmp_path / "all" / "notes.txt").write_text("no picture")
    found = list(list_pictures([str(tmp_path / "all")]))
    assert [place.key for place in found] == [
        *("001.jpg", "002.jpg", "a.tar/x.jpg", "a.tar/deep/y.jpg"),
        *(f"b.parquet/{group:04d}-{row:06d}" for group, row in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))),
        "sub/000.jpg",
    ]
    assert found == list(list_pictures([str(tmp_path / "all")]))
    read = contents(found)
    assert read[2] == jpeg(0)
    assert read[3] == jpeg(1)
    assert read[4:9] == [jpeg(n) for n in range(5)]


@pytest.mark.parametrize("column", ["jpg", "mine"])
def test_parquet_of_plain_bytes(tmp_path, column):
    file = parquet(tmp_path / "a.parquet", {"caption": ["x", "y"], column: [jpeg(0), None]})
    places = list(list_pictures([str(file)], None if column == "jpg" else column))
    good, bad = contents(places)
    assert good == jpeg(0)
    assert "holds no bytes" in str(bad)


def test_links_over_http(tmp_path, monkeypatch):
    photos(tmp_path / "www", 3)
    monkeypatch.setattr(storage, "PAUSE", 0.01)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        file = parquet(tmp_path / "a.parquet", {"url": [f"{root}/001.jpg", f"{root}/none.jpg", ""]})
        good, missing, empty = contents(list(list_pictures([str(file)])))
    finally:
        server.shutdown()
    assert good == jpeg(1)
    assert isinstance(missing, OSError)
    assert "is no URL" in str(empty)


def test_object_storage(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/photos/a.jpg", jpeg(0))
    memory.pipe_file("/bucket/photos/b/c.jpg", jpeg(1))
    memory.pipe_file("/bucket/photos/d.tar", tar(tmp_path / "d.tar", ["x"]).read_bytes())
    places = list(list_pictures(["memory://bucket/photos"]))
    assert [place.key for place in places] == ["a.jpg", "b/c.jpg", "d.tar/x.jpg"]
    assert contents(places) == [jpeg(0), jpeg(1), jpeg(0)]


def test_what_is_no_source_is_passed_over(tmp_path):
    root = tmp_path / "all"
    root.mkdir()
    tar(root / "00000.tar", ["x"])
    parquet(root / "00000.parquet", {"url": ["https://example.com/x.jpg"], "key": ["x"]})  # as img2dataset writes
    parquet(root / "labels.parquet", {"label": [1]})
    (root / "._a.jpg").write_bytes(b"of a file system")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(jpeg(1))
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root)  # in a circle
    (root / "out").mkdir()
    (root / "out" / "c.jpg").write_bytes(jpeg(2))
    found = list_pictures([str(root)], leave_out=str(root / "out"))
    assert [place.key for place in found] == ["00000.tar/x.jpg", "link/b.jpg"]


def test_a_list_of_links_opens_no_files_here(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    file = parquet(tmp_path / "a.parquet", {"url": [str(tmp_path / "a.jpg"), f"file://{tmp_path}/a.jpg", None]})
    for each in contents(list(list_pictures([str(file)]))):
        assert "is no URL" in str(each)


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        list(list_pictures([str(tmp_path / "none")]))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(LoftUpError, match="no pictures in"):
        list(list_pictures([str(tmp_path)]))
    for name, text in (("a.tar.gz", "unpack it"), ("b.tar", "pack it again"), ("c.parquet", "as Parquet")):
        (tmp_path / name).write_bytes(b"x" * 600)
        with pytest.raises(LoftUpError, match=text):
            list(list_pictures([str(tmp_path / name)]))
    with pytest.raises(LoftUpError, match="none of them of pictures.*column="):
        list(list_pictures([str(parquet(tmp_path / "d.parquet", {"a": [1], "b": [2]}))]))
    with pytest.raises(LoftUpError, match="is int64; expected bytes"):
        list(list_pictures([str(tmp_path / "d.parquet")], "a"))


def test_a_source_that_changed_is_told(tmp_path):
    file = tar(tmp_path / "a.tar", ["x"])
    places = list(list_pictures([str(file)]))
    file.write_bytes(file.read_bytes()[:700])
    assert "changed since it was listed" in str(contents(places)[0])


def test_remote_reads_are_tried_again(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    tries = []

    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("now and then")
        return b"x"

    assert storage._again(flaky, "u") == b"x"
    with pytest.raises(OSError, match="cannot read u: ZeroDivisionError"):
        storage._again(lambda: 1 / 0, "u")


def test_jpegs_are_as_pillow_reads_them(tmp_path):
    from PIL import Image

    content = jpeg(3)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(content).numpy(), expected)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(content)).save(turned, "JPEG", exif=exif)
    assert tuple(decode(turned.getvalue()).shape) == (3, 80, 60)
    for mode, kind in (("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")):
        stream = io.BytesIO()
        Image.open(io.BytesIO(content)).convert(mode).save(stream, kind)
        assert tuple(decode(stream.getvalue()).shape) == (3, 60, 80)
    with pytest.raises(OSError, match=r"cannot read the image cut\.jpg"):
        decode(content[: len(content) // 2], "cut.jpg")
