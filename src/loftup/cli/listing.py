"""The command ``loftup list``: the weights that there are."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..weights.catalogue import CATALOGUE

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("list", help="weights: published ones, and those in the package")
    parser.set_defaults(run=_run)
    parser.add_argument("--json", action="store_true", help="as JSON, with all fields")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps([asdict(checkpoint) for checkpoint in CATALOGUE.values()], indent=2))
        return 0
    rows = [("NAME", "C", "PATCH", "HUB REPOSITORY", "LICENCE", "BACKBONE (timm)")]
    for weights in CATALOGUE.values():
        channels, patch_size = (str(size or "any") for size in (weights.channels, weights.patch_size))
        repo = weights.repo or "in the package"
        backbone = (weights.timm or weights.backbones[0]) if weights.channels else "any"
        rows.append((weights.name, channels, patch_size, repo, weights.licence, backbone))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
