"""``loftup eval``: a task for several upsamplers, tables of results, and what there is."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..backbones import Backbone
from ..errors import LoftUpError
from ..files import MADE_BY, alone_in, refuse_others, write_atomically
from .catalogue import TASKS

__all__ = ["run"]


def run(arguments: argparse.Namespace, backbone_of: Callable[[argparse.Namespace], Backbone]) -> int:
    """Do what the command line says; returns the exit status, 1 where an upsampler failed.

    Args:
        arguments: of :func:`loftup.cli.options.add_eval_commands`.
        backbone_of: makes the backbone that they name.
    """
    if arguments.task == "list":
        return _list(arguments)
    if arguments.task == "table":
        return _table(arguments)
    from .run import Comparison

    settings, every = dict(arguments.set), getattr(arguments, "every", None)
    # Who names a setting has a protocol in mind; data is none.
    protocol = arguments.protocol or ("paper" if set(settings) - {"train"} or every or arguments.seeds else "quick")
    if protocol == "quick":
        settings = {**TASKS[arguments.task].quick, **settings}
    settings["device"] = arguments.device
    if arguments.seeds is not None:
        settings["seeds"] = arguments.seeds
    oracle = arguments.backbone == "oracle"
    description: dict[str, Any] = {"name": arguments.backbone}
    if oracle and arguments.views > 1:
        raise LoftUpError(
            f"--views {arguments.views} with --backbone oracle, which knows pictures as they are, and none that is "
            "shifted; leave --views out"
        )
    if not oracle:
        description |= {"layer": arguments.layer, **dict(arguments.option)}
        # One view goes without saying, as in the results of before.
        description |= {"views": arguments.views} if arguments.views > 1 else {}
        description |= {key: value for key in ("mean", "std") if (value := getattr(arguments, key))}
        if arguments.backbone_weights:
            description["weights"] = Path(arguments.backbone_weights).name
    with alone_in(arguments.output.expanduser(), ["pictures"]):
        comparison = Comparison(
            arguments.task,
            getattr(arguments, "dataset", None),
            None if oracle else backbone_of(arguments),
            description,
            settings,
            arguments.output,
            arguments.overwrite,
            arguments.trust_remote_code,
            every or int(protocol == "paper"),
        )
        if protocol == "quick":
            print(f"the quick protocol, for a first look: {_said(settings)}; else --protocol paper", file=sys.stderr)
        failed = comparison.run(arguments.upsampler, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"wrote {arguments.output}" if comparison.rows else "nothing to write", file=sys.stderr)
    return 1 if failed else 0


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key != "device") or "few samples"


def _table(arguments: argparse.Namespace) -> int:
    from .table import comma_separated, markdown, read_results

    metrics = arguments.metrics.split(",") if arguments.metrics else None
    results = read_results(arguments.folders)
    if arguments.output is None:
        print(markdown(results, metrics))
        return 0
    makers = {".md": markdown, ".csv": comma_separated}
    if arguments.output.suffix not in makers:
        raise LoftUpError(f"expected a file with one of the suffixes {', '.join(makers)}, got {arguments.output}")
    refuse_others([arguments.output])
    mark = f"\n<!-- {MADE_BY} -->\n" if arguments.output.suffix == ".md" else ""
    write_atomically(arguments.output, (makers[arguments.output.suffix](results, metrics) + mark).encode())
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from . import datasets, upsamplers

    by_task = {name: datasets.names(name) for name, task in TASKS.items() if task.data}
    if arguments.json:
        print(json.dumps({"upsamplers": upsamplers.names(), "datasets": by_task}, indent=2))
        return 0
    print(f"upsamplers: {', '.join(upsamplers.names())}\n")
    width = max(map(len, TASKS))
    for name in TASKS:
        print(f"{name.ljust(width)}  {', '.join(by_task.get(name, ['(no dataset)']))}")
    return 0
