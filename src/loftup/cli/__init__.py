"""The command ``loftup``: one file a command."""

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import FAILURES, one_line
from ..version import __version__
from . import demo, eval, export, features, find, fit, listing, masks, match, segment, train, video, web

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 some images failed, 2 nothing could be done)."""
    _prepare_streams()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its client tells of every try to reach the Hub
    command = ""
    try:
        try:
            arguments = _parse(argv)
            command = f" {arguments.command}"
            return int(arguments.run(arguments))
        finally:
            sys.stdout.flush()  # where it is full or broken, this command fails, and not Python's last breath
    except BrokenPipeError:  # nobody reads on: loftup list | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (*FAILURES, OverflowError) as error:
        print(f"loftup{command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = command in (" features", " segment", " find", " masks", " eval")
        again = "; files already written are whole, run again to resume" if resumes else ""
        print(f"\nloftup{command}: interrupted{again}", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Standard streams that are there, and that show what they cannot encode as codes."""
    if None in (sys.stdin, sys.stdout, sys.stderr):  # closed: pythonw, some services, 2>&-
        while os.open(os.devnull, os.O_RDWR) < 3:  # their numbers, which the next files would get
            pass
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # KEY=VALUE behind an option, which argparse does not find
        if arguments.command != "train" or any(text.startswith("-") or "=" not in text for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loftup", description="Pixel-dense features from any vision backbone.")
    parser.add_argument("--version", action="version", version=f"loftup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, features, segment, find, match, listing, export, video, web, masks, train, fit, eval):
        command.add_parser(commands)
    return parser
