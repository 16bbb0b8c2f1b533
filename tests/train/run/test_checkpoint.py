"""Checkpoints are whole or absent, hold no code, and tell what differs; tables go on where they were left."""

import dataclasses
import errno
import math
import random
import sys

import numpy as np
import pytest
import torch

from loftup import LoftUpError
from loftup.train.run import checkpoint, logs
from loftup.train.run.checkpoint import (
    ENTRIES,
    Progress,
    differences,
    latest_checkpoint,
    load_checkpoint,
    prune,
    random_states,
    read_progress,
    restore_random_states,
    save_checkpoint,
    step_file,
)
from loftup.train.run.logs import Table


def state(step):
    return {
        "step": step,
        "optimizer": {"state": {0: torch.full((2,), float(step))}},
        "best": math.inf,
        "random": random_states(),
        **dict.fromkeys(name for name in ENTRIES if name not in ("step", "optimizer", "random")),
    }


def test_what_is_saved_comes_back(tmp_path):
    path = step_file(tmp_path / "new", 12)
    assert path.name == "step_000012.pt"
    save_checkpoint(path, state(12))
    loaded = load_checkpoint(path)
    assert loaded["step"] == 12
    assert loaded["best"] == math.inf
    assert loaded["optimizer"]["state"][0].tolist() == [12.0, 12.0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_random_states_come_back(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    np.random.seed(3)
    save_checkpoint(tmp_path / "step_1.pt", state(1))
    expected = draw()
    assert draw() != expected
    restore_random_states(load_checkpoint(tmp_path / "step_1.pt")["random"])
    assert draw() == expected


def test_the_last_ones_are_kept(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 999_999, 1_000_000, 30):
        save_checkpoint(step_file(tmp_path, step), state(step))
    save_checkpoint(tmp_path / "best.pt", state(5))
    (tmp_path / ".step_000031.pt.0123").write_bytes(b"half")
    (tmp_path / "step_x.pt").write_bytes(b"not ours")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000.pt"
    prune(tmp_path, 2)
    left = {"best.pt", "step_999999.pt", "step_1000000.pt", "step_x.pt"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = step_file(tmp_path, 3)
    save_checkpoint(path, state(3))

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    message = r"step_000004.pt \(0.0 MB\): .*No space left.*free some space and go on from step_000003.pt with --resume"
    with pytest.raises(LoftUpError, match=message):
        save_checkpoint(step_file(tmp_path, 4), state(4))
    assert load_checkpoint(path)["step"] == 3
    path.unlink()
    with pytest.raises(LoftUpError, match=r"No space left on device; free some space, or set another folder"):
        save_checkpoint(path, state(3))


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "step_000001.pt"
    save_checkpoint(path, state(1))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        LoftUpError, match=r"cannot read the checkpoint .*step_000001.pt: .*remove it to go on from the one"
    ):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(
        LoftUpError, match=r"step_000001.pt is no checkpoint of a training run: expected the entries step"
    ):
        load_checkpoint(path)
    torch.save({"step": 1, "optimizer": tmp_path}, path)
    with pytest.raises(LoftUpError, match="cannot read the checkpoint"):
        load_checkpoint(path)
    torch.save({"step": 1, "optimizer": {}}, path)
    with pytest.raises(LoftUpError, match=r"others; it lacks state_dict, objective, .*loftup_config$"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", bytes(1000), b"\x80\x04N.", b"c" * 50])
def test_a_checkpoint_of_anything_can_be_removed(tmp_path, content):
    path = step_file(tmp_path, 2)
    path.write_bytes(content)
    with pytest.raises(LoftUpError, match=r"step_000002.pt: .+; remove it to go on from the one before"):
        load_checkpoint(path)


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    path = step_file(tmp_path, 2)
    save_checkpoint(path, {**state(2), "objective": {"x": torch.arange(10_000.0)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(10_000.0).numpy().tobytes()) + 5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoftUpError, match="its part .* is damaged; remove it to go on from the one before"):
        load_checkpoint(path)


def test_differences_between_configs():
    before = {"seed": 0, "steps": 10, "data": {"workers": 2, "flip": 0.5, "path": ["a"]}, "validation": {"size": 3}}
    now = {
        "seed": 0,
        "steps": 20,
        "data": {"workers": 0, "flip": 0.1, "path": ["b"]},
        "validation": {"size": 4},
        "x": 1,
    }
    assert differences(before, before) == []
    assert differences(before, now) == ["data.flip: 0.5, now 0.1", "x: None, now 1"]


def test_a_table_goes_on_after_the_step(tmp_path):
    path = tmp_path / "run" / "log.csv"
    table = Table(path)
    for step in (1, 2, 3, 10):
        table.add({"step": step, "loss": 1 / step})
    whole = path.read_text()
    assert whole == "step,loss\n1,1.0\n2,0.5\n3,0.3333333333333333\n10,0.1\n"
    # A killed run may have left half a line, whose step reads as another.
    path.write_text(whole[: whole.index("0,0.1")])
    table = Table(path, 2)
    assert path.read_text() == "step,loss\n1,1.0\n2,0.5\n"
    table.add({"step": 3, "loss": 1 / 3})
    table.add({"step": 10, "loss": 0.1})
    assert path.read_text() == whole
    table.add({"step": 11, "other": 2})
    table.add({"step": 12, "other": 3, "loss": 4})
    assert path.read_text() == whole.replace("\n", ",\n").replace("loss,", "loss,other") + "11,,2\n12,4,3\n"
    Table(path, 10).add({"step": 11, "loss": 5})
    assert path.read_text().endswith("10,0.1,\n11,5,\n")
    Table(path, 0).add({"step": 1, "other": 2})
    assert path.read_text() == "step,other\n1,2\n"


def test_a_table_that_was_never_written(tmp_path):
    path = tmp_path / "log.csv"
    path.touch()
    Table(path, 5).add({"step": 6, "loss": 1.0})
    assert path.read_text() == "step,loss\n6,1.0\n"


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"my,own\n", b"step,loss\nx,2\n", b"step\n\xff\n", b'step,x\n"1\r2",\x00\n']
)
def test_a_table_that_is_none_is_named(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(LoftUpError, match=r"log.csv is damaged \(.*\); remove it"):
        Table(tmp_path / "log.csv", 5)
    assert (tmp_path / "log.csv").read_bytes() == content


def test_a_table_that_cannot_be_written(tmp_path):
    table = Table(tmp_path / "log.csv")
    table.path.mkdir()
    with pytest.raises(LoftUpError, match=r"cannot write .*log.csv: .*directory"):
        table.add({"step": 1})


def test_missing_tensorboard_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LoftUpError, match=r'need tensorboard: pip install "loftup\[train\]"'):
        logs.Board(tmp_path)


def test_progress_of_before_is_read():
    values = {"step": 7, "sums": {"loss": 3.0}, "summed": 2}
    assert read_progress(values) == Progress(step=7, sums={"loss": (3.0, 2)})
    assert read_progress(dataclasses.asdict(Progress(step=7, sums={"loss": (3.0, 2)}))).sums == {"loss": (3.0, 2)}
