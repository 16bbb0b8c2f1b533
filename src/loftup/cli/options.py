"""Options that several commands have."""

import argparse
import json
from typing import Any

__all__ = ["add_backbone_options", "add_model_options", "key_value", "positive"]

DTYPES = ("float32", "bfloat16", "float16")


def add_backbone_options(parser: argparse.ArgumentParser, default: str | None = "dinov2_vits14") -> None:
    """Options that name a backbone and a device; with no default, what comes in the package is meant."""
    add = parser.add_argument
    text = "%(default)s" if default else "tiny and its upsamplers, all in the package"
    add("--backbone", default=default, metavar="NAME", help=f"loftup's or timm's name (default: {text})")
    add("--backbone-weights", metavar="FILE", help="local weights of the backbone; default: from the Hub")
    add("--layer", type=int, metavar="K", help="stage or block of the backbone to take; default: its last")
    add("--option", action="append", default=[], type=key_value, metavar="KEY=VALUE", help="passed to timm, repeatable")
    add("--mean", nargs=3, type=float, metavar=("R", "G", "B"), help="image mean of the backbone; default: its own")
    add("--std", nargs=3, type=float, metavar=("R", "G", "B"), help="image deviation of the backbone; default: its own")
    add("--device", default="cpu", help="torch device (default: %(default)s)")


def add_model_options(parser: argparse.ArgumentParser, backbone: str | None = "dinov2_vits14") -> None:
    """Options that name a backbone, an upsampler, sizes, device and dtype; ``backbone`` is the default one."""
    add_backbone_options(parser, backbone)
    add = parser.add_argument
    kinds = "name (any: for every backbone), repository, folder, file"
    add("--weights", metavar="NAME|PATH", help=f"LoftUp weights: {kinds}; default: --backbone's")
    add("--strict", action="store_true", help="refuse a backbone without LoftUp weights of its own; else it gets any")
    longest = "the image's, at most 512 long"
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help=f"of the result; default: {longest}")
    short = "short side of the backbone's input (default: %(default)s)"
    add("--input", type=positive, default=224, metavar="N", help=short)
    add("--dtype", choices=DTYPES, default="float32", help="of the LoftUp network (default: %(default)s)")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def key_value(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value as JSON where it is JSON (16, true, [1,2]), else as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
