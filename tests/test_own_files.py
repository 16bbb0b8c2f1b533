"""Files that are whole, marked and the user's own; folders for one run at a time."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from loftup import LoftUpError
from loftup.files import MADE_BY, alone_in, check_regular, made_here, refuse_others, sweep, write_atomically
from loftup.pictures import encode, open_picture

HOLD = """
import sys, pathlib, time
from loftup.files import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print('in', flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_for_one_process_and_a_dead_one_holds_nothing(holder, tmp_path):
    folder = tmp_path / "out"
    expected = f"process {holder.pid} on {socket.gethostname()} is writing to the folder .*out, expected this one alone"
    with pytest.raises(LoftUpError, match=expected), alone_in(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (folder / ".loftup.0123456789abcdef").write_bytes(b"half")
    (folder / "pictures").mkdir()
    (folder / "pictures" / ".loftup.0123456789abcdef").write_bytes(b"half")
    (folder / ".loftup.mine").write_bytes(b"mine")
    with alone_in(folder, ["pictures", "checkpoints"]):
        assert (folder / ".loftup.owner").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert sorted(path.name for path in folder.rglob("*")) == [".loftup.mine", "pictures"]


def test_a_holder_without_a_name_is_another_process(tmp_path):
    with alone_in(tmp_path):
        (tmp_path / ".loftup.owner").unlink()
        with pytest.raises(LoftUpError, match="another process is writing to the folder"), alone_in(tmp_path):
            pass


def test_a_folder_that_was_made_in_vain_is_removed(tmp_path):
    with alone_in(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with alone_in(tmp_path / "a" / "b"):
        write_atomically(tmp_path / "a" / "b" / "c", b"x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, code):
    def refuse(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.warns(UserWarning, match="out has no locks .*; see to it that no other process"),
        alone_in(tmp_path / "out"),
    ):
        write_atomically(tmp_path / "out" / "a", b"x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_folder_that_cannot_be_locked_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="Input/output error"), alone_in(tmp_path):
        pass


def test_only_old_files_of_others_are_swept(tmp_path):
    old, new = (tmp_path / f".loftup.{digit * 16}" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"half")
    hours = time.time() - 7200
    os.utime(old, (hours, hours))
    sweep(tmp_path, older=3600)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize(
    "content",
    [
        f"# {MADE_BY}\nsteps: 1\n".encode(),
        b'{"info":{"made_by":"loftup 0.1","settings":{}},"image":{}}',
        b'{"channels": 3, "library_name": "loftup"}',
        b"---\nlibrary_name: loftup\n---\n",
        b'{"task": "x",' + b" " * 10_000 + b'"environment": {\n  "loftup": "0.1"}}',
        b"x" * 10_000 + f"<!-- {MADE_BY} -->\n".encode(),
    ],
)
def test_what_loftup_made_is_told_by_a_mark(tmp_path, content):
    (tmp_path / "ours").write_bytes(content)
    assert made_here(tmp_path / "ours")
    refuse_others([tmp_path / "ours", tmp_path / "absent"])


@pytest.mark.parametrize("content", [b"", b"# My project, with loftup\n", b'{"mine": 1}', b"step,loss\n1,2\n"])
def test_what_is_a_users_is_refused(tmp_path, content):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(LoftUpError, match="mine exists and was not made by loftup, which replaces only its own files"):
        refuse_others([tmp_path / "mine"])


def test_links_and_folders_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(LoftUpError, match=f"{name} exists and was not made by loftup"):
            refuse_others([tmp_path / name])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_carry_the_mark(tmp_path, kind):
    noise = Image.effect_noise((200, 300), 80).convert("RGB")
    (tmp_path / "ours").write_bytes(encode(noise, kind))
    noise.save(tmp_path / "theirs", kind)
    assert made_here(tmp_path / "ours")
    assert not made_here(tmp_path / "theirs")
    assert Image.open(tmp_path / "ours").size == noise.size


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe.png is no regular file but a folder, pipe or device"):
        check_regular(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"cannot read the image .*pipe.png: .* is no regular file"):
        open_picture(tmp_path / "pipe.png")
    assert not made_here(tmp_path / "pipe.png")


def test_names_of_255_bytes_are_written(tmp_path):
    write_atomically(tmp_path / ("x" * 255), b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
