"""Results as tables."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import LoftUpError
from .catalogue import TASKS
from .result import Metric

__all__ = ["comma_separated", "markdown", "read_file", "read_results"]

Results = Mapping[str, Any]


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """``results.json`` of every folder (or the file itself).

    Raises:
        LoftUpError: a file is missing or holds something else.
    """
    all_results = []
    for folder in folders:
        file = folder if folder.is_file() else folder / "results.json"
        try:
            all_results.append(read_file(file))
        except OSError as error:
            raise LoftUpError(f"expected results.json of `loftup eval` in {folder}: {error}") from error
    return all_results


def read_file(file: Path) -> dict[str, Any]:
    """One ``results.json``; OSError where it cannot be read, LoftUpError where it holds something else."""
    try:
        results: dict[str, Any] = json.loads(file.read_text("utf-8"))
        results["dataset"], results["config"], TASKS[results["task"]], results["backbone"].get("name")
        for row in results["upsamplers"].values():
            row["upsampler"], {name: fmean(values) for name, values in row["metrics"].items()}
            float(row["parameters"]), float(row["seconds"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoftUpError(f"{file} does not hold results of `loftup eval` ({error!r}); remove it") from error
    return results


def markdown(all_results: Sequence[Results], metrics: Sequence[str] | None = None) -> str:
    """A Markdown table for every task, dataset, backbone and protocol; rows are upsamplers, the best value is bold.

    Values are means over the seeds, with the spread (largest less smallest) where there are several.

    Args:
        all_results: of :func:`read_results`; those of one protocol are joined, later ones replace rows of one label.
        metrics: names of those to show; None for all.

    Raises:
        LoftUpError: no result has one of the metrics.
    """
    sections = []
    for group in _groups(all_results):
        rows = _rows(group)
        columns = _columns(group[0], rows, metrics)
        if not columns:
            continue
        headings = " | ".join(metric.heading for metric in columns.values())
        lines = [f"### {_title(group[0])}", "", _protocol(group[0]), ""]
        lines += [f"| upsampler | {headings} | parameters | s in all |", "|---|" + "---:|" * (len(columns) + 2)]
        measured = [row["metrics"] for row in rows.values()]
        best = {name: _best(metric, [each.get(name) for each in measured]) for name, metric in columns.items()}
        for label, row in rows.items():
            cells = []
            for name, metric in columns.items():
                text, value = _cell(metric, row["metrics"].get(name))
                cells.append(f"**{text}**" if text and value == best[name] and len(rows) > 1 else text)
            lines.append(f"| {label} | {' | '.join(cells)} | {_millions(row['parameters'])} | {row['seconds']:.0f} |")
        sections.append("\n".join(lines) + "\n")
    if metrics and not sections:
        raise LoftUpError(f"no result has the metric {', '.join(metrics)}; they have {_all_names(all_results)}")
    return "\n".join(sections)


def comma_separated(all_results: Sequence[Results], metrics: Sequence[str] | None = None) -> str:
    """The same as CSV: one line for every upsampler and metric, with mean, smallest and largest value and seeds."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    heading = ("task", "dataset", "backbone", "layer", "upsampler", "metric", "mean", "least", "greatest", "seeds")
    table.writerow([*heading, "parameters", "seconds"])
    for group in _groups(all_results):
        rows = _rows(group)
        for label, row in rows.items():
            for name in _columns(group[0], rows, metrics):
                if values := row["metrics"].get(name):
                    backbone = group[0]["backbone"]
                    where = (group[0]["task"], group[0]["dataset"], backbone.get("name"), backbone.get("layer"))
                    numbers = (f"{v:.6g}" for v in (fmean(values), min(values), max(values)))
                    table.writerow([*where, label, name, *numbers, len(values), row["parameters"], row["seconds"]])
    return text.getvalue()


def _groups(all_results: Sequence[Results]) -> list[list[Results]]:
    groups: dict[str, list[Results]] = {}
    for results in all_results:
        key = json.dumps([results[name] for name in ("task", "dataset", "backbone", "config")], sort_keys=True)
        groups.setdefault(key, []).append(results)
    return list(groups.values())


def _rows(group: Sequence[Results]) -> dict[str, Any]:
    return {label: row for results in group for label, row in results["upsamplers"].items()}


def _columns(results: Results, rows: Mapping[str, Any], metrics: Sequence[str] | None) -> dict[str, Metric]:
    """The task's metrics that a row has, of those asked for."""
    table = TASKS[results["task"]].load()[2]
    present = {name for row in rows.values() for name in row["metrics"]}
    return {name: table[name] for name in (metrics or table) if name in present and name in table}


def _all_names(all_results: Sequence[Results]) -> str:
    return ", ".join(sorted({n for r in all_results for row in r["upsamplers"].values() for n in row["metrics"]}))


def _title(results: Results) -> str:
    backbone = results["backbone"]
    layer = f", layer {backbone['layer']}" if backbone.get("layer") is not None else ""
    on = f" on {results['dataset']}" if results["dataset"] else ""
    return f"{results['task']}{on}, {backbone.get('name') or 'backbone'}{layer}"


def _protocol(results: Results) -> str:
    settings = [f"{key} {value}" for key, value in results["config"].items() if key not in ("pictures", "device")]
    options = {key: value for key, value in results["backbone"].items() if key not in ("name", "layer")}
    backbone = [f"{key} {value}" for key, value in options.items() if value]
    return f"Protocol: {', '.join(settings)}." + (f" Backbone: {', '.join(backbone)}." if backbone else "")


def _cell(metric: Metric, values: Sequence[float] | None) -> tuple[str, float | None]:
    if not values:
        return "", None
    mean = round(fmean(values), metric.decimals)
    spread = f" ± {max(values) - min(values):.{metric.decimals}f}" if len(values) > 1 else ""
    return f"{mean:.{metric.decimals}f}{spread}", mean


def _best(metric: Metric, columns: Sequence[Sequence[float] | None]) -> float | None:
    means = [value for values in columns if (value := _cell(metric, values)[1]) is not None and value == value]
    return (max if metric.higher_is_better else min)(means) if means else None


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters else "0"
