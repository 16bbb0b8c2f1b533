"""How time and memory grow with pixels, cells, channels and batch, as a table and a figure; and a picture of 12 MP.

    python benchmarks/growth.py [-o docs/growth.png] [--quick]

Every point is a process of its own: the median of five calls, where they take long a single one, and the peak of the
process's memory above what was there before the call, without the result (Linux). ``any`` and LoftUp have 384 channels,
and a linear head of 21 classes where pixels grow, so that the result fits into memory. The last row is a picture of
4000x3000 pixels from the image to the logits: DINOv2's ViT-S/14 (random weights, which cost as much) on 1344x1008
pixels, then ``any``. Writes benchmarks/results/growth.csv.
"""

import argparse
import csv
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from measure import Table, describe
from run import status
from torch import Tensor, nn

from loftup import LoftUp, load_backbone

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START = {"size": 448, "grid": 32, "channels": 384, "batch": 1, "head": 0}
SERIES: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {  # what grows, what else differs, and its values
    "pixels": ("size", {"head": 21}, (224, 448, 896, 1792, 4096)),
    "cells": ("grid", {}, (8, 16, 32, 64, 128)),
    "channels": ("channels", {}, (96, 192, 384, 768, 1536)),
    "batch": ("batch", {"size": 224, "grid": 16}, (1, 2, 4, 8, 16)),
}
LOFTUP = {"pixels": (224, 448, 896), "cells": (8, 16, 32, 64), "batch": (1, 2, 4)}  # its values, of those


def measure(run: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Median seconds and MiB of a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds, peak = status("VmRSS"), [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, status("VmHWM") - before - result.nbytes)
        del result
    return {"s": statistics.median(seconds), "working_mib": peak / 2**20, "process_mib": status("VmHWM") / 2**20}


def point(given: Mapping[str, Any]) -> dict[str, float]:
    """Measure one point in this process."""
    torch.manual_seed(0)
    if given["network"] == "picture":
        return picture()
    up = LoftUp.from_pretrained("any") if given["network"] == "any" else LoftUp(given["channels"])
    up.eval().requires_grad_(False)
    if given["network"] == "loftup":
        up.to(torch.bfloat16)
    features = torch.randn(given["batch"], given["channels"], given["grid"], given["grid"]).to(up.dtype)
    image = torch.rand(given["batch"], 3, given["size"], given["size"])
    head = nn.Linear(given["channels"], given["head"]).to(up.dtype) if given["head"] else None
    up(features[:1], image[:1, :, :32, :32], head=head)  # libraries and prepared weights
    return measure(lambda: up(features, image, head=head), given["rounds"])


def picture() -> dict[str, float]:
    """A photograph of 12 megapixels, from the image to the logits of 21 classes for every pixel."""
    backbone = load_backbone("dinov2_vits14", weights=False)
    up, head = LoftUp.from_pretrained("any"), nn.Linear(backbone.channels, 21).requires_grad_(False)
    image = torch.rand(1, 3, 3000, 4000)

    def run() -> Tensor:
        with torch.inference_mode():
            small = nn.functional.interpolate(image, (1008, 1344), mode="bilinear", antialias=True)
            return up(backbone(small), image, head=head)

    return measure(run, 1)


def in_own_process(given: Mapping[str, Any]) -> dict[str, float]:
    """Run :func:`point` in a fresh process."""
    command = [sys.executable, __file__, "--point", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{given} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the last two points in logarithms: 1 is proportional."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("growth.png"))
    parser.add_argument("--table", type=Path, help="default: results/growth.csv, with --quick ./growth.csv")
    parser.add_argument("--quick", action="store_true", help="the two smallest values of each series")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="draw a table again, without measuring")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        with arguments.draw.open(newline="") as stream:
            draw(list(csv.DictReader(stream)), arguments.output)
        return
    if arguments.point:
        with torch.inference_mode():
            print(json.dumps(point(arguments.point)))
        return
    about = describe("cpu")
    results = Path("growth.csv") if arguments.quick else Path(__file__).parent / "results" / "growth.csv"
    table = Table(arguments.table or results, ["network", "series", *START, "s", "working_mib", "process_mib", *about])

    def add(given: dict[str, Any], series: str) -> None:
        result = in_own_process(given)
        numbers = {name: f"{value:.4g}" for name, value in result.items()}
        row = {"network": given["network"], "series": series, **{name: given.get(name, "") for name in START}}
        table.add({name: str(value) for name, value in row.items()} | numbers | about)
        print(*row.values(), numbers, flush=True)

    for network in ("any", "loftup"):
        for series, (name, others, values) in SERIES.items():
            chosen = values if network == "any" else LOFTUP.get(series, ())
            for value in chosen[:2] if arguments.quick else chosen:
                given = {**START, **others, name: value, "network": network}
                given["rounds"] = 5 if network == "any" and value < 1000 else 1
                add(given, series)
    if not arguments.quick:
        add({"network": "picture", "size": "3000x4000", "head": 21, "channels": 384, "batch": 1}, "12 MP")
    draw(table.rows, arguments.output)


def draw(rows: Sequence[Mapping[str, str]], output: Path) -> None:
    """Time above, memory below; a panel for each series."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for line in rows:
        if series := SERIES.get(line["series"]):
            x = float(line[series[0]]) ** (2 if line["series"] in ("pixels", "cells") else 1)
            point = (x, float(line["s"]), float(line["working_mib"]))
            found.setdefault((line["network"], line["series"]), []).append(point)
    figure, panels = plt.subplots(2, len(SERIES), figsize=(14, 6.5), layout="constrained", sharex="col")
    for column, series in enumerate(SERIES):
        for row, (unit, axes) in enumerate(zip(("seconds", "MiB beside the result"), panels[:, column], strict=True)):
            for network, colour in (("any", "#0072b2"), ("loftup", "#d55e00")):
                points = found.get((network, series), [])
                if len(points) < 2:
                    continue
                x, *y = zip(*points, strict=True)
                label = "LoftUp, bfloat16" if network == "loftup" else "any"
                if row == 0:
                    label += f", slope {slope(x, y[0]):.2f}"
                axes.loglog(x, [max(1.0, each) if row else each for each in y[row]], "o-", color=colour, label=label)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=9, loc="lower right" if row else "upper left")
            axes.margins(y=0.3)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            if column == 0:
                axes.set_ylabel(unit)
            if row:
                axes.set_xlabel(series)
                axes.set_ylim(1, 2000)
    figure.savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
