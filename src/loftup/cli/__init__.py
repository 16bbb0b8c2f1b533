"""The command ``loftup``: one file a command."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import FAILURES, one_line
from ..version import __version__
from . import demo, eval, features, listing, masks, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 some images failed, 2 nothing could be done)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # KEY=VALUE behind an option, which argparse does not find
        if arguments.command != "train" or any(text.startswith("-") or "=" not in text for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    try:
        return int(arguments.run(arguments))
    except FAILURES as error:
        print(f"loftup {arguments.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = arguments.command in ("features", "masks", "eval")
        again = "; files already written are whole, run again to resume" if resumes else ""
        print(f"\nloftup {arguments.command}: interrupted{again}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loftup", description="Pixel-dense features from any vision backbone.")
    parser.add_argument("--version", action="version", version=f"loftup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, features, listing, masks, train, eval):
        command.add_parser(commands)
    return parser
