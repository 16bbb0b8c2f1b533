"""The same extraction on a local Ray cluster whose processes are killed."""

import contextlib
import threading
import time

import psutil
import pytest
import torch
from photos import QUICK, photos

from loftup import LoftUpError
from loftup.scale import engines, extract
from loftup.scale.engines import Cluster

pytest.importorskip("ray")


def kill_workers(done, killed):
    """Kill the first worker of this process's cluster that comes up."""
    while not done.is_set() and not killed:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()).startswith("ray::MapWorker"):
                    process.kill()
                    killed.append(process.pid)
                    break
        time.sleep(0.05)


def test_killed_workers_change_nothing(tmp_path):
    album = photos(tmp_path / "photos", 16)
    (album / "005.jpg").write_bytes(b"no picture")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        extract(album, tmp_path / "here", **QUICK, device="cpu")
    finally:
        torch.set_num_threads(threads)
    done, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(done, killed), daemon=True)
    killer.start()
    try:
        summary = extract(album, tmp_path / "ray", **QUICK, engine="ray", cluster=Cluster(workers=1))
    finally:
        done.set()
    assert (summary.pictures, summary.written, summary.failed) == (16, 15, 1)
    assert sum(part["pictures"] for part in summary.parts) == 16
    assert len(killed) == 1
    for folder in ("data", "errors", "plan"):
        here, ray = (
            {path.name: path.read_bytes() for path in (tmp_path / name / folder).iterdir() if path.suffix == ".parquet"}
            for name in ("here", "ray")
        )
        assert [name for name in here | ray if here.get(name) != ray.get(name)] == [], folder
    for part in summary.parts:
        assert part["read"][1] <= part["compute"][0]
        assert part["compute"][1] <= part["write"][0]


def test_the_room_for_workers():
    assert engines._most({"CPU": 8.0}, Cluster(cpus=2)) == 4
    assert engines._most({"CPU": 8.0, "GPU": 2.0}, Cluster(gpus=0.5)) == 4
    assert engines._most({"CPU": 8.0, "GPU": 2.0}, Cluster(cpus=8, gpus=0.5)) == 1
    with pytest.raises(LoftUpError, match="has 0 GPUs, a worker asks for 1; give fewer gpus"):
        engines._most({"CPU": 8.0}, Cluster(gpus=1))
    with pytest.raises(LoftUpError, match="has 8 CPUs, a worker asks for 16; give fewer cpus"):
        engines._most({"CPU": 8.0, "GPU": 4.0}, Cluster(cpus=16, gpus=1))
    with pytest.raises(ValueError, match="a fraction of 1, or a whole number"):
        Cluster(gpus=1.5)
    with pytest.raises(ValueError, match="workers must be a positive whole number"):
        Cluster(workers=0)
