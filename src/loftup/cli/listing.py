"""The command ``loftup list``: the weights that there are."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..weights.catalogue import CATALOGUE, Checkpoints

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
    print(Checkpoints(CATALOGUE.values()))
    return 0
