"""The command ``loftup masks``: class-agnostic masks of pictures, to train on."""

import argparse
from typing import Any

from .options import DEVICE, number, place, positive, word

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("masks", help="make class-agnostic masks of pictures, to train on")
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("folder", type=place, metavar="FOLDER", help="pictures, and folders of them")
    copied = "copy the pictures there, beside their masks; default: FOLDER"
    add("-o", "--output", type=place, metavar="DIR", help=copied)
    maker = parser.add_mutually_exclusive_group()
    model = "by a SAM model of transformers: name on the Hub, or folder"
    maker.add_argument("--sam", type=word, metavar="MODEL", help=model)
    segments = "by Felzenszwalb's segments (the default: it needs no download)"
    maker.add_argument("--felzenszwalb", action="store_true", help=segments)
    add("--scales", nargs="+", type=number, metavar="K", help="Felzenszwalb: sizes of segments (default: 300 600 1200)")
    add("--sigma", type=number, metavar="S", help="Felzenszwalb: smoothing in pixels (default: 0.8)")
    add("--min-size", type=positive, metavar="N", help="Felzenszwalb: smallest segment in pixels (default: 100)")
    add("--side", type=positive, metavar="N", help="Felzenszwalb: short side to reduce pictures to (default: 480)")
    add("--points-per-side", type=positive, metavar="N", help="SAM: of the grid of prompts (default: 32)")
    add("--points-per-batch", type=positive, metavar="N", help="SAM: prompts decoded at once (default: 64)")
    add("--pred-iou-threshold", type=number, metavar="T", help="SAM: lowest quality it gives itself (default: 0.88)")
    add("--stability-threshold", type=number, metavar="T", help="SAM: lowest stability of a mask (default: 0.95)")
    add("--device", type=word, help=f"SAM: {DEVICE}")
    add("--overwrite", action="store_true", help="make masks anew that are there already")
    add("--preview", type=place, metavar="DIR", help="write all pictures there with their masks in random colours")


def _run(arguments: argparse.Namespace) -> int:
    from ..train.masks.command import run
    from .models import choose_device

    if arguments.sam:
        choose_device(arguments)
    return run(arguments)
