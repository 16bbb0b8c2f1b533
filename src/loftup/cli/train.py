"""The command ``loftup train``: weights for a backbone of one's own."""

import argparse
from typing import Any

from .options import word

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("train", help="train an upsampler for a backbone")
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("config", type=word, metavar="CONFIG", help="YAML file, or a ready config such as quick_cpu")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="replace values of it: optimizer.rate=1e-3")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--push-to-hub", type=word, metavar="REPO", help="upload the weights at the end; same as hub=REPO")


def _run(arguments: argparse.Namespace) -> int:
    from ..train.run.command import run

    return run(arguments)
