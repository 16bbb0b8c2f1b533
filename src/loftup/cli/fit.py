"""The command ``loftup fit``: an ``any`` of one's own backbone, in minutes and without labels."""

import argparse
from typing import Any

from .options import add_backbone_options, place, positive, positive_number, word

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("fit", help="fit any to a backbone, by photographs without labels")
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("pictures", nargs="+", type=place, metavar="FOLDER", help="photographs, at least 20, better some hundreds")
    made = "for the weights, their card, a comparison picture and the training"
    add("-o", "--output", type=place, required=True, metavar="DIR", help=made)
    add_backbone_options(parser)
    time = "what it may take in all, about: the first steps are timed (default: %(default)g)"
    add("--minutes", type=positive_number, default=10.0, metavar="M", help=time)
    add("--steps", type=positive, metavar="N", help="steps of the training, in place of --minutes")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: %(default)s: none)")
    replaced = "replace a value of the ready config fit, such as optimizer.rate=1e-4; repeatable"
    add("--set", action="append", default=[], type=word, metavar="KEY=VALUE", help=replaced)
    add("--resume", action="store_true", help="go on with a fit that was stopped or killed")


def _run(arguments: argparse.Namespace) -> int:
    from ..train.fit.command import run
    from .models import check_backbone, choose_device

    choose_device(arguments)
    check_backbone(arguments)
    return run(arguments)
