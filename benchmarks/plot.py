"""Time and working memory against output size, from the CSV that run.py writes; log-log, two panels.

python benchmarks/plot.py benchmarks/results/cpu.csv -o docs/benchmark.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import CASES

LABELS = {
    "published:float32": "published way, float32",
    "published_sdpa:float32": "published with fused attention, float32",
    "loftup:cpu:float32": "loftup, float32",
    "loftup:cpu:bfloat16": "loftup, bfloat16",
    "loftup:triton:float32": "loftup (Triton), float32",
    "loftup:triton:bfloat16": "loftup (Triton), bfloat16",
    "bilinear:float32": "bilinear interpolation",
}


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmark.png"))
    arguments = parser.parse_args()
    sizes = {c.name: c.size for c in CASES if c.channels == 384 and c.batch == 1 and not c.head and not c.points}
    sizes.pop("c384_1024_73x73_b1")
    with open(arguments.table, newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["case"] in sizes]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for contender, label in LABELS.items():
        own = sorted((sizes[row["case"]], row) for row in rows if row["contender"] == contender)
        if not own:
            continue
        xs = [size for size, _ in own]
        axes[0].plot(xs, [float(row["p50_s"]) for _, row in own], "o-", label=label)
        if not contender.startswith("bilinear"):
            axes[1].plot(xs, [max(1.0, float(row["working_mib"])) for _, row in own], "o-", label=label)
    for axis, title in zip(axes, ("seconds an image", "working memory, MiB (without the result)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="output side, pixels", title=title)
        axis.set_xticks(sorted(set(sizes.values())), [str(size) for size in sorted(set(sizes.values()))], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"C = 384, batch 1, {rows[0]['machine']}, PyTorch {rows[0]['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
