"""Throughput of an extraction by Ray against that of N processes by themselves, and a profile of what overlaps.

    python benchmarks/scale_speed.py PHOTOS -o FOLDER [--workers 2] [--rounds 3] [--limit 512] [--plot docs/scale.png]

Each round runs both: N processes at once, each with one thread and a share of the pictures, and a Ray cluster of N
workers. A rate is pictures over the time from the first computation to the last shard, so without loading. Writes
FOLDER/speed.json; the figure shows the last run on Ray: what was read, computed and written when.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

from loftup.pictures import IMAGE_SUFFIXES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ONE = """
import json, sys
import torch
from loftup.scale import extract
from loftup.scale.engines import Cluster
if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    summary = extract(settings.pop("photos"), settings.pop("output"), cluster=Cluster(workers=settings.pop("workers")),
                      device=settings.pop("device"), **settings)
    print(json.dumps(summary.parts))
"""
STEPS = {"read": "#0072b2", "compute": "#e69f00", "write": "#009e73"}


def start(photos: Path, output: Path, engine: str, workers: int, given: argparse.Namespace) -> "subprocess.Popen[str]":
    """Begin an extraction in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    settings = {"photos": str(photos), "output": str(output), "engine": engine, "workers": workers, "part": given.part}
    settings |= {"backbone": given.backbone, "weights": "any", "save": ["features", "pooled"]}
    settings |= {"device": "cpu" if engine == "local" else None, "input": given.input}
    words = [sys.executable, "-c", ONE, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)


def parts_of(process: "subprocess.Popen[str]") -> list[dict]:
    """The parts that a process reports."""
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return json.loads(text.splitlines()[-1])


def rate(parts: list[dict]) -> float:
    """Pictures a second from the first computation to the last shard."""
    return sum(part["pictures"] for part in parts) / (
        max(part["write"][1] for part in parts) - min(part["compute"][0] for part in parts)
    )


def overlap(parts: list[dict], step: str) -> float:
    """The share of a step's time in which something else was computed."""
    total = covered = 0.0
    for part in parts:
        begin, end = part[step]
        total += end - begin
        edges = sorted({begin, end, *(t for p in parts for t in p["compute"] if begin < t < end)})
        for left, right in pairwise(edges):
            middle = (left + right) / 2
            if any(p["compute"][0] <= middle <= p["compute"][1] for p in parts if p is not part):
                covered += right - left
    return covered / total if total else 0.0


def draw(parts: list[dict], path: Path) -> None:
    """Bars of every part's steps over time."""
    zero = min(part["compute"][0] for part in parts)
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for row, part in enumerate(sorted(parts, key=lambda each: each["compute"][0])):
        for name, colour in STEPS.items():
            begin, end = part[name]
            axes.barh(
                row,
                max(end - begin, 0.05),
                left=begin - zero,
                color=colour,
                height=0.8,
                label=name if row == 0 else None,
            )
    axes.set(xlabel="seconds since the first computation", ylabel="parts", yticks=[])
    axes.invert_yaxis()
    axes.legend(loc="upper right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", type=Path)
    add("-o", "--output", type=Path, required=True)
    add("--workers", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--limit", type=int, default=512)
    add("--part", type=int, default=16)
    add("--input", type=int, default=224)
    add("--backbone", default="tiny")
    add("--plot", type=Path)
    given = parser.parse_args()
    files = sorted(file for file in given.photos.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)[: given.limit]
    shutil.rmtree(given.output / "photos", ignore_errors=True)
    for index, file in enumerate(files):
        share = given.output / "photos" / str(index % given.workers)
        share.mkdir(parents=True, exist_ok=True)
        (share / f"{index:05d}{file.suffix}").symlink_to(file.resolve())
    alone, ray, parts = [], [], []
    for _ in range(given.rounds):
        running = [
            start(given.output / "photos" / str(n), given.output / f"alone{n}", "local", 1, given)
            for n in range(given.workers)
        ]
        alone.append(sum(rate(parts_of(each)) for each in running))
        parts = parts_of(start(given.output / "photos", given.output / "ray", "ray", given.workers, given))
        ray.append(rate(parts))
        print(f"alone {alone[-1]:.2f}, ray {ray[-1]:.2f} pictures a second", file=sys.stderr)
    share = statistics.median(r / a for r, a in zip(ray, alone, strict=True))
    result = {"alone": alone, "ray": ray, "share": share, "pictures": len(files), "workers": given.workers}
    result |= {f"{step}_beside_compute": overlap(parts, step) for step in ("read", "write")}
    (given.output / "speed.json").write_text(json.dumps(result | {"parts": parts}, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "parts"}))
    if given.plot:
        draw(parts, given.plot)


if __name__ == "__main__":
    main()
