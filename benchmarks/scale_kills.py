"""Kill an extraction at random moments, start it again, and compare what it wrote with an undisturbed one.

    python benchmarks/scale_kills.py PHOTOS -o FOLDER [--kills 30] [--limit 2000] [--backbone tiny] [--seed 0]

A local Ray cluster of two workers extracts the pictures. Again and again a process is killed with SIGKILL: a worker, or
in one case of three the command itself, which is then started again.
Some pictures are damaged on purpose. The undisturbed extraction runs in one process with one thread. The result is
compared shard by shard, byte by byte, and picture by picture: none may be missing, none may be there twice. The last
line is a summary; the exit status is 1 where anything differs.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from loftup.pictures import IMAGE_SUFFIXES
from loftup.scale import open as open_features

DAMAGED = 5


def main() -> int:
    """Run both extractions and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", type=Path, nargs="+", help="folders")
    add("-o", "--output", type=Path, required=True, help="an empty folder")
    add("--kills", type=int, default=30)
    add("--limit", type=int, default=2000, help="pictures that are taken")
    add("--part", type=int, default=16)
    add("--pause", type=float, default=8.0, help="mean seconds between two kills")
    add("--backbone", default="tiny")
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    pictures = collect(given.photos, given.output / "pictures", given.limit)
    words = [str(given.output / "pictures"), "--backbone", given.backbone, "--weights", "any", "--format", "parquet"]
    words += ["--save", "features,pooled", "--part", str(given.part)]
    command = [sys.executable, "-m", "loftup", "features", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet, killed = given.output / "undisturbed", given.output / "killed"
    start = time.perf_counter()
    # 1: some pictures failed, as is meant here.
    assert subprocess.run([*command, "-o", str(quiet), "--device", "cpu"], env=environment).returncode == 1
    alone = time.perf_counter() - start
    ray = [*command, "-o", str(killed), "--engine", "ray", "--workers", "2"]
    start = time.perf_counter()
    kinds = disturb(ray, environment, random.Random(given.seed), given.kills, given.pause)
    disturbed = time.perf_counter() - start
    faults = compare(quiet, killed, pictures)
    rate = pictures / alone
    print(f"undisturbed, one process: {alone:.0f} s, {rate:.1f} pictures a second with its start")
    print(f"killed: {dict(kinds)}; {disturbed:.0f} s until all was there")
    print(
        "\n".join(faults) or f"{pictures} pictures, {DAMAGED} of them damaged: none lost, none twice, all bytes equal"
    )
    return 1 if faults else 0


def collect(folders: list[Path], target: Path, limit: int) -> int:
    """Link pictures into one folder, some of them cut off in the middle; returns how many."""
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    files = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg")][:limit]
    target.mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(files):
        copy = target / f"{index:05d}{file.suffix}"
        copy.unlink(missing_ok=True)  # a link from before: nothing is written through it
        if index % (len(files) // DAMAGED) == len(files) // DAMAGED // 2:
            content = file.read_bytes()
            copy.write_bytes(content[: len(content) // 2])
        else:
            copy.symlink_to(file.resolve())
    return len(files)


def disturb(
    command: list[str], environment: dict[str, str], luck: random.Random, kills: int, pause: float
) -> Counter[str]:
    """Run a command until it is done, killing it or what it started in between; returns what was killed how often."""
    killed: Counter[str] = Counter()
    driver = subprocess.Popen(command, env=environment)
    while True:
        while driver.poll() is None and not workers(driver):  # it has nothing to lose yet
            time.sleep(0.2)
        try:
            status = driver.wait(luck.uniform(0, 2 * pause) if sum(killed.values()) < kills else None)
            if status in (0, 1) and sum(killed.values()) >= kills:
                return killed
            if status in (0, 1):
                raise SystemExit(f"done after {dict(killed)}: more pictures, or a shorter --pause")
            print(f"the command ended with {status}; started again", file=sys.stderr)
            driver = subprocess.Popen(command, env=environment)
            continue
        except subprocess.TimeoutExpired:
            pass
        if luck.random() < 1 / 3:
            driver.kill()
            driver.wait()  # Ray's processes follow it
            killed["the command"] += 1
            driver = subprocess.Popen(command, env=environment)
            continue
        if there := workers(driver):
            luck.choice(there).kill()
            killed["a worker"] += 1


def workers(driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes of a command's Ray cluster that read, compute and write."""
    with contextlib.suppress(psutil.Error):
        return [each for each in psutil.Process(driver.pid).children(recursive=True) if "Map" in title(each)]
    return []


def title(process: psutil.Process) -> str:
    """The name that a process gives itself, such as ray::MapWorker...; "" where it has ended."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return words[0] if words and words[0].startswith("ray::") else ""
    return ""


def compare(quiet: Path, killed: Path, pictures: int) -> list[str]:
    """List the pictures and shards that are missing, twice, or different."""
    faults = []
    names = sorted(path.name for path in (quiet / "data").iterdir())
    there = sorted(path.name for path in (killed / "data").iterdir() if not path.name.startswith(".loftup."))
    if names != there:
        faults.append(f"shards differ: {set(names) ^ set(there)}")
    faults += [
        f"{name} differs"
        for name in set(names) & set(there)
        if (quiet / "data" / name).read_bytes() != (killed / "data" / name).read_bytes()
    ]
    features = open_features(killed)
    keys = Counter(record.key for record in features) + Counter(row["key"] for row in features.errors())
    expected = {path.name for path in (quiet.parent / "pictures").iterdir()}
    faults += [f"{key} is there {count} times" for key, count in keys.items() if count > 1]
    faults += [f"{key} is lost" for key in expected - set(keys)]
    if len(features) != pictures - DAMAGED or len(features.errors()) != DAMAGED:
        faults.append(
            f"{len(features)} pictures and {len(features.errors())} errors, expected {pictures - DAMAGED}, {DAMAGED}"
        )
    return faults


if __name__ == "__main__":
    sys.exit(main())
