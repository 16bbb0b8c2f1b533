"""Options of the command ``loftup``."""

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_backbone_options", "add_eval_commands", "add_mask_options", "add_model_options"]

DTYPES = ("float32", "bfloat16", "float16")
TASKS = {
    "segmentation": "semantic segmentation with a linear probe",
    "depth": "monocular depth",
    "normals": "surface normals",
    "video": "video object segmentation by label propagation",
    "open_vocabulary": "segmentation by texts, with a CLIP and the features as its proxy",
    "interactive": "selecting an object by a click",
    "efficiency": "parameters, time and memory; needs no dataset",
}


def add_backbone_options(parser: argparse.ArgumentParser, default: str | None = "dinov2_vits14") -> None:
    """Options that name a backbone and a device; with no default, what comes in the package is meant."""
    add = parser.add_argument
    shown = "%(default)s" if default else "tiny and its upsamplers, all in the package"
    add("--backbone", default=default, metavar="NAME", help=f"loftup's or timm's name (default: {shown})")
    add("--backbone-weights", metavar="FILE", help="local weights of the backbone; default: from the Hub")
    add("--layer", type=int, metavar="K", help="stage or block of the backbone to take; default: its last")
    add("--option", action="append", default=[], type=_option, metavar="KEY=VALUE", help="passed to timm, repeatable")
    add("--mean", nargs=3, type=float, metavar=("R", "G", "B"), help="image mean of the backbone; default: its own")
    add("--std", nargs=3, type=float, metavar=("R", "G", "B"), help="image deviation of the backbone; default: its own")
    add("--device", default="cpu", help="torch device (default: %(default)s)")


def add_model_options(parser: argparse.ArgumentParser, backbone: str | None = "dinov2_vits14") -> None:
    """Options that name a backbone, an upsampler, sizes, device and dtype; ``backbone`` is the default one."""
    add_backbone_options(parser, backbone)
    add = parser.add_argument
    add(
        "--weights",
        metavar="NAME|PATH",
        help="LoftUp weights: name (any: for every backbone), repository, folder, file; default: --backbone's",
    )
    add("--strict", action="store_true", help="refuse a backbone without LoftUp weights of its own; else it gets any")
    add(
        "--size",
        nargs=2,
        type=_positive,
        metavar=("H", "W"),
        help="of the result; default: the image's, at most 512 long",
    )
    add(
        "--input",
        type=_positive,
        default=224,
        metavar="N",
        help="short side of the backbone's input (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of the LoftUp network (default: %(default)s)")


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``loftup masks``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="pictures, and folders of them")
    add("-o", "--output", type=Path, metavar="DIR", help="copy the pictures there, beside their masks; default: FOLDER")
    maker = parser.add_mutually_exclusive_group()
    maker.add_argument("--sam", metavar="MODEL", help="by a SAM model of transformers: name on the Hub, or folder")
    maker.add_argument(
        "--felzenszwalb", action="store_true", help="by Felzenszwalb's segments (the default: it needs no download)"
    )
    add("--scales", nargs="+", type=float, metavar="K", help="Felzenszwalb: sizes of segments (default: 300 600 1200)")
    add("--sigma", type=float, metavar="S", help="Felzenszwalb: smoothing in pixels (default: 0.8)")
    add("--min-size", type=_positive, metavar="N", help="Felzenszwalb: smallest segment in pixels (default: 100)")
    add("--side", type=_positive, metavar="N", help="Felzenszwalb: short side to reduce pictures to (default: 480)")
    add("--points-per-side", type=_positive, metavar="N", help="SAM: of the grid of prompts (default: 32)")
    add("--points-per-batch", type=_positive, metavar="N", help="SAM: prompts decoded at once (default: 64)")
    add("--pred-iou-threshold", type=float, metavar="T", help="SAM: lowest quality it gives itself (default: 0.88)")
    add("--stability-threshold", type=float, metavar="T", help="SAM: lowest stability of a mask (default: 0.95)")
    add("--device", default="cpu", help="SAM: torch device (default: %(default)s)")
    add("--overwrite", action="store_true", help="make masks anew that are there already")
    add("--preview", type=Path, metavar="DIR", help="write all pictures there with their masks in random colours")


def add_eval_commands(parser: argparse.ArgumentParser) -> None:
    """The tasks of ``loftup eval``, and what is done with their results."""
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, text in TASKS.items():
        task = commands.add_parser(name, help=text)
        if name != "efficiency":
            task.add_argument(
                "--dataset", required=True, metavar="NAME:PATH", help="see loftup eval list; or synthetic"
            )
        add_backbone_options(task)
        add = task.add_argument
        add("--upsampler", required=True, metavar="U[,U...]", help="[LABEL=]NAME[:ARGUMENT], see loftup eval list")
        add("--seeds", type=_positive, metavar="N", help="how many times heads are trained (default: the task's)")
        add("--set", action="append", default=[], type=_option, metavar="KEY=VALUE", help="of the task's protocol")
        add("-o", "--output", type=Path, required=True, metavar="DIR", help="for results.json, tables and pictures")
        add("--overwrite", action="store_true", help="forget results that are there already")
    listing = commands.add_parser("list", help="upsamplers, tasks and datasets by name")
    listing.add_argument("--json", action="store_true", help="as JSON")
    table = commands.add_parser("table", help="join the results of several folders")
    table.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="written by loftup eval TASK -o DIR")
    table.add_argument("--metrics", metavar="M[,M...]", help="which ones; default: all")
    table.add_argument("-o", "--output", type=Path, metavar="FILE", help=".md or .csv; default: print Markdown")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value as JSON where it is JSON (16, true, [1,2]), else as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
