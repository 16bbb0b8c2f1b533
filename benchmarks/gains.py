"""Numbers of several `loftup eval` folders as one table: upsamplers against bilinear interpolation.

Of every labelled set there are three gains, each over bilinear with the same seed, in points: of mIoU, of boundary
mIoU, and what is kept: the mIoU of the probe that was trained on low-resolution features and judged on upsampled ones.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

BASE = "bilinear"
GAINS = {"gain": "miou", "boundary gain": "boundary_miou", "kept": "lowres_probe_miou"}


@dataclass(frozen=True)
class Column:
    """Values of every upsampler, one a seed, and how they are written."""

    heading: str
    values: dict[str, list[float]]
    decimals: int = 2
    higher_is_better: bool = True
    gain: bool = False

    def mean(self, label: str) -> float | None:
        """As it is shown; None where there is none."""
        values = self.values.get(label)
        return round(fmean(values), self.decimals) if values else None

    def best(self) -> float | None:
        """Of the means that are there."""
        means = [mean for label in self.values if (mean := self.mean(label)) is not None and mean == mean]
        return (max if self.higher_is_better else min)(means, default=None)

    def cell(self, label: str) -> str:
        """Mean and spread (largest less smallest), bold where it is the best."""
        mean = self.mean(label)
        if mean is None:
            return ""
        values = self.values[label]
        spread = f" ± {max(values) - min(values):.{self.decimals}f}" if len(values) > 1 else ""
        text = f"{mean:{'+' if self.gain else ''}.{self.decimals}f}{spread}"
        return f"**{text}**" if mean == self.best() else text


def gains(results: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """Gains of every labelled set over bilinear, and their mean over all of these sets.

    Args:
        results: content of ``results.json`` by the name of the set; those without bilinear have no gains.

    Returns:
        Three columns a set, and three for the mean where there are several sets, of what was run on all of them.
    """
    sets = {name: each["upsamplers"] for name, each in results.items() if BASE in each["upsamplers"]}
    columns = []
    for name, rows in sets.items():
        for heading, metric in GAINS.items():
            values = {label: _above(row["metrics"], rows[BASE]["metrics"], metric) for label, row in rows.items()}
            columns.append(Column(f"{name}, {heading}", {k: v for k, v in values.items() if v}, gain=True))
    if len(sets) < 2:
        return columns
    for index, heading in enumerate(GAINS):
        each_set = [column.values for column in columns[index :: len(GAINS)]]
        everywhere = [label for label in each_set[0] if all(label in values for values in each_set)]
        means = {
            label: [fmean(seeds) for seeds in zip(*(values[label] for values in each_set), strict=False)]
            for label in everywhere
        }
        columns.append(Column(f"mean, {heading}", means, gain=True))
    return columns


def plain(name: str, results: Mapping[str, Any], metrics: Mapping[str, Any], chosen: Sequence[str]) -> list[Column]:
    """Chosen numbers of one folder as they are; ``metrics`` are its task's, by name."""
    columns = []
    for metric in chosen:
        rows = results["upsamplers"].items()
        values = {label: row["metrics"][metric] for label, row in rows if metric in row["metrics"]}
        form = metrics[metric]
        columns.append(Column(f"{name}, {form.heading}", values, form.decimals, form.higher_is_better))
    return columns


def labels_of(columns: Sequence[Column]) -> list[str]:
    """All upsamplers, in the order of their first number."""
    return list(dict.fromkeys(label for column in columns for label in column.values))


def markdown(columns: Sequence[Column], labels: Sequence[str]) -> str:
    """A row an upsampler; the best of every column is bold."""
    lines = [f"| upsampler | {' | '.join(column.heading for column in columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {label} | {' | '.join(column.cell(label) for column in columns)} |" for label in labels]
    return "\n".join(lines) + "\n"


def comma_separated(columns: Sequence[Column], labels: Sequence[str]) -> str:
    """A line for every number: mean, smallest and largest value, seeds, and whether it is the best of its column."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["upsampler", "column", "mean", "least", "greatest", "seeds", "best"])
    for label in labels:
        for column in columns:
            if values := column.values.get(label):
                numbers = (f"{value:.6g}" for value in (fmean(values), min(values), max(values)))
                best = "yes" if column.mean(label) == column.best() else ""
                table.writerow([label, column.heading, *numbers, len(values), best])
    return text.getvalue()


def _above(metrics: Mapping[str, list[float]], base: Mapping[str, list[float]], metric: str) -> list[float]:
    if metric not in metrics or metric not in base:
        return []
    return [mine - other for mine, other in zip(metrics[metric], base[metric], strict=False)]
