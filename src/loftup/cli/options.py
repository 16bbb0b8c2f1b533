"""Options that several commands have."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

__all__ = [
    "DEVICE",
    "add_backbone_options",
    "add_model_options",
    "key_value",
    "number",
    "place",
    "positive",
    "positive_number",
    "views",
    "word",
]

DTYPES = ("float32", "bfloat16", "float16")
LONGEST = "the image's, at most 512 long, so that photographs of any size need little memory"
DEVICE = "torch device; default: cuda where there is one, else cpu"


def add_backbone_options(
    parser: argparse.ArgumentParser, default: str | None = "dinov2_vits14", without: str = ""
) -> None:
    """Options that name a backbone and a device.

    Args:
        parser: to add them to.
        default: the backbone; None is what comes in the package, or ``without``.
        without: what is done without a backbone.
    """
    add = parser.add_argument
    said = "%(default)s" if default else without or "tiny, which comes with the package"
    add("--backbone", default=default, type=word, metavar="NAME", help=f"loftup's or timm's name (default: {said})")
    add(
        "--backbone-weights",
        type=word,
        metavar="FILE",
        help="local weights of the backbone; default: from the Hub",
    )
    add("--layer", type=int, metavar="K", help="stage or block of the backbone to take; default: its last")
    add("--option", action="append", default=[], type=key_value, metavar="KEY=VALUE", help="passed to timm, repeatable")
    mean, std = "image mean of the backbone; default: its own", "image deviation of the backbone; default: its own"
    add("--mean", nargs=3, type=number, metavar=("R", "G", "B"), help=mean)
    add("--std", nargs=3, type=positive_number, metavar=("R", "G", "B"), help=std)
    said = "%(default)s" if default else "1" if without else "4 of tiny where no --backbone is named, else 1"
    several = f"shifted views of each picture, for a finer grid: 1, 4, 9 or 16 passes of the backbone (default: {said})"
    add("--views", type=views, default=1 if default else None, metavar="N", help=several)
    add("--device", type=word, help=DEVICE)


def add_model_options(
    parser: argparse.ArgumentParser, backbone: str | None = "dinov2_vits14", size: str = LONGEST
) -> None:
    """Options that name a backbone, an upsampler, sizes, device, dtype; ``backbone`` and ``size`` are defaults."""
    add_backbone_options(parser, backbone)
    add = parser.add_argument
    kinds = "name (any: for every backbone), repository, folder, file"
    add("--weights", type=word, metavar="NAME|PATH", help=f"LoftUp weights: {kinds}; default: --backbone's")
    add("--strict", action="store_true", help="refuse a backbone without LoftUp weights of its own; else it gets any")
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help=f"of the result; default: {size}")
    short = "short side of the backbone's input (default: %(default)s)"
    add("--input", type=positive, default=224, metavar="N", help=short)
    add("--dtype", choices=DTYPES, default="float32", help="of the LoftUp network (default: %(default)s)")


def word(given: str) -> str:
    """A value that is not empty: "" is no way to leave an option out."""
    if not given:
        raise argparse.ArgumentTypeError("expected a value, got ''; leave the option out for its default")
    return given


def place(given: str) -> Path:
    return Path(word(given))


def positive(given: str) -> int:
    if not given.isdecimal() or len(given) > 9 or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {given!r}")
    return int(given)


def views(given: str) -> int:
    if given not in ("1", "4", "9", "16"):
        raise argparse.ArgumentTypeError(f"expected 1, 4, 9 or 16, got {given!r}")
    return int(given)


def number(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {given!r}")
    return value


def positive_number(given: str) -> float:
    if (value := number(given)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {given!r}")
    return value


def key_value(given: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value as JSON where it is JSON (16, true, [1,2]), else as a string."""
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {given!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise argparse.ArgumentTypeError(f"cannot read the value of {key}: {error}") from error
