"""Seconds a picture of loftup and its rivals on a CPU, as a table and as README's figure.

    python benchmarks/speed.py --anyup WEIGHTS@FOLDER --jafar WEIGHTS@FOLDER [-o docs/speed.png]

Contenders take turns in one process; medians, with the fastest and the slowest, go to benchmarks/results/cpu_speed.csv.
"""

import argparse
import functools
import statistics
from pathlib import Path

import matplotlib
import torch
from cases import CASES
from contenders import RIVALS, contender, make_inputs, make_loftup
from measure import Table, describe, in_turns

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASE = next(case for case in CASES if case.name == "c384_448_32x32_b1")
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
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anyup", required=True, metavar="WEIGHTS@FOLDER")
    parser.add_argument("--jafar", required=True, metavar="WEIGHTS@FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "cpu_speed.csv")
    parser.add_argument("-o", "--output", type=Path, default=Path("speed.png"))
    given = parser.parse_args()
    RIVALS.update(anyup=given.anyup, jafar=given.jafar)
    up, (features, image) = make_loftup(CASE.channels, "cpu"), make_inputs(CASE, "cpu")
    with torch.inference_mode():
        calls = {name: functools.partial(contender(name, up, CASE), features, image) for name in LABELS}
        for name, call in calls.items():
            if not name.startswith("published"):  # half a minute, which needs no warm-up
                call()
        seconds = in_turns(calls, "cpu", given.rounds)
    about = describe("cpu")
    table = Table(given.table, ["case", "contender", "rounds", "least_s", "median_s", "most_s", *about])
    medians = {}
    for name, each in seconds.items():
        medians[name] = statistics.median(each)
        row = {"case": CASE.name, "contender": name, "rounds": len(each)}
        row |= {"least_s": f"{min(each):.4f}", "median_s": f"{medians[name]:.4f}", "most_s": f"{max(each):.4f}"}
        table.add({key: str(value) for key, value in row.items()} | about)
        print(f"{LABELS[name]:26} {medians[name]:8.3f} s")
    draw(medians, given.output)
    print(f"wrote {given.output}")


def draw(medians: dict[str, float], output: Path) -> None:
    """Draw the medians as bars, ours in colour."""
    figure, axis = plt.subplots(figsize=(9, 2.6))
    own = ["#3f51b5" if "loftup" in LABELS[name] else "#b0b0b0" for name in medians]
    bars = axis.barh([LABELS[name] for name in medians], list(medians.values()), color=own)
    axis.bar_label(bars, [f" {value:.2g} s" for value in medians.values()], fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)
    axis.set_xlim(0, 1.08 * max(medians.values()))
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
