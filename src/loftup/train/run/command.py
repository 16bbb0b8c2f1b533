"""``loftup train``: a training run from a config and the command line."""

import argparse
import os
import sys

from ..config import load_config
from .engine import Interrupted, train

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Train as the command line says; returns the exit status, 128 and the signal's number for a stopped run."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.push_to_hub:
        config.hub = arguments.push_to_hub
    try:
        train(config, resume=arguments.resume)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"loftup train: {stop}", file=sys.stderr)
        return stop.status
    return 0
