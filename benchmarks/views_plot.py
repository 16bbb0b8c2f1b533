"""Figure of benchmarks/results/views_cost.csv: quality against cost of finer grids.

python benchmarks/views_plot.py benchmarks/results/views_cost.csv -o docs/views.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "miou_gain": "mIoU over bilinear",
    "boundary_miou_gain": "the same near outlines",
    "lowres_probe_miou_gain": "probe of low-resolution features",
}
COLOURS = {"shifted views": "tab:blue", "larger input": "tab:orange", "overlapping patches": "tab:green"}


def main() -> None:
    """Draw the means of the sets that every row has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    with given.file.open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == "mean"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        for way, colour in COLOURS.items():
            for upsampler, style in (("bilinear", "o--"), ("any", "o-")):
                # The picture as it is starts every line.
                own = [row for row in rows if row["upsampler"] == upsampler and row["features"] in ("one view", way)]
                own.sort(key=lambda row: float(row["tokens"]))
                places, gains = [float(row["tokens"]) for row in own], [float(row[column]) for row in own]
                axis.plot(places, gains, style, color=colour, label=f"{way}, {upsampler}", markersize=4)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 4, 9], ["1", "2", "4", "9"])
        axis.minorticks_off()
        axis.set_xlabel("tokens, times those of one view")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("points")
    axes[0].legend(fontsize=7)
    figure.savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()
