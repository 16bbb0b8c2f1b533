"""README's figure: seconds a picture of loftup and its rivals on a CPU, from the CSV that run.py writes.

python benchmarks/speed.py benchmarks/results/cpu_xeon.csv -o docs/speed.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASE = "c384_448_32x32_b1"
LABELS = {
    "published:float32": "LoftUp, as published",
    "anyup:float32": "AnyUp",
    "jafar:float32": "JAFAR",
    "loftup:cpu:float32": "LoftUp by loftup",
    "loftup:cpu:bfloat16": "LoftUp by loftup, bfloat16",
    "any:float32": "any by loftup",
    "bilinear:float32": "bilinear interpolation",
}


def main() -> None:
    """Draw the medians as bars, ours in colour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("speed.png"))
    given = parser.parse_args()
    with given.table.open(newline="") as stream:
        medians = {row["contender"]: float(row["p50_s"]) for row in csv.DictReader(stream) if row["case"] == CASE}
    seconds = [medians[name] for name in LABELS]
    figure, axis = plt.subplots(figsize=(9, 2.6))
    own = ["#3f51b5" if "loftup" in label else "#b0b0b0" for label in LABELS.values()]
    bars = axis.barh(list(LABELS.values()), seconds, color=own)
    axis.bar_label(bars, [f" {value:.2g} s" for value in seconds], fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)
    axis.set_xlim(0, 1.08 * max(seconds))
    figure.tight_layout()
    figure.savefig(given.output, dpi=110)
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
