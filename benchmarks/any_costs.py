"""What LoftUp.from_pretrained("any") costs: time and FLOPs against bilinear interpolation and LoftUp, and memory.

    python benchmarks/any_costs.py [--rounds N] [--threads N] [-o benchmarks/results/any_costs.csv]

Contenders of a size take turns, round after round, in one process; the CSV has medians, the fastest and the slowest.
FLOPs are those of the whole-image path by PyTorch's counter (two for each multiply-add; convolutions and matrix
products alone). Memory is the highest resident size of a process of its own that makes 21 logits at 2048x2048 from
features of 128x128 cells and 384 channels, everything included.
"""

import argparse
import copy
import csv
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from loftup import LoftUp

SIZES = ((224, 16), (448, 32))
CHANNELS = 384
LARGE = """
import resource, torch
from loftup import LoftUp
torch.manual_seed(0)
up, head = LoftUp.from_pretrained("any"), torch.nn.Conv2d(384, 21, 1)
features, image = torch.randn(1, 384, 128, 128), torch.rand(1, 3, 2048, 2048)
head = head if {linear} else (lambda x, conv=head: conv(x))
with torch.inference_mode():
    assert up(features, image, head=head).shape == (1, 21, 2048, 2048)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def flops(up: LoftUp, features: torch.Tensor, image: torch.Tensor) -> int:
    """Of the network on a whole image, counted without computing: untiled, LoftUp's attention would take gigabytes."""
    shapes = copy.deepcopy(up).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes.upsampler(shapes.channelnorm(features.to("meta")), image.to("meta"))
    return counter.get_total_flops()


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("any_costs.csv"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    ups = {"any": LoftUp.from_pretrained("any"), "loftup": LoftUp(CHANNELS).eval()}
    machine = f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}"
    rows = []
    for size, grid in SIZES:
        features, image = torch.randn(1, CHANNELS, grid, grid), torch.rand(1, 3, size, size)

        def bilinear(features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            return F.interpolate(features, image.shape[-2:], mode="bilinear", align_corners=False)

        contenders = {"bilinear": bilinear, **ups}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        with torch.inference_mode():
            for turn in range(given.rounds + 1):
                for name, run in contenders.items():
                    start = time.perf_counter()
                    run(features, image)
                    if turn:  # the first is a warm-up
                        seconds[name].append(time.perf_counter() - start)
        for name, taken in seconds.items():
            up = ups.get(name)
            rows.append(
                {
                    "contender": name,
                    "size": size,
                    "grid": grid,
                    "channels": CHANNELS,
                    "parameters": sum(p.numel() for p in up.parameters()) if up is not None else 0,
                    "gflop": round(flops(up, features, image) / 1e9, 1) if up is not None else "",
                    "median_s": round(statistics.median(taken), 4),
                    "fastest_s": round(min(taken), 4),
                    "slowest_s": round(max(taken), 4),
                    "peak_mib": "",
                    "machine": machine,
                }
            )
            print(rows[-1], flush=True)
    for linear in (True, False):
        made = subprocess.run([sys.executable, "-c", LARGE.format(linear=linear)], capture_output=True, check=True)
        name = "any, 21 logits by nn.Conv2d" if linear else "any, 21 logits by a function"
        peak = round(int(made.stdout) / (2**20 if sys.platform == "darwin" else 2**10))
        rows.append({**dict.fromkeys(rows[0], ""), "contender": name, "size": 2048, "grid": 128, "channels": CHANNELS})
        rows[-1] |= {"peak_mib": peak, "machine": machine}
        print(rows[-1], flush=True)
    with given.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
