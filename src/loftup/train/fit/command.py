"""``loftup fit``: an ``any`` of one's own backbone, from photographs."""

import argparse
import os
import sys

from ...errors import LoftUpError
from ..config import load_config  # noqa: F401  (says what is missing of the extra before any work)
from ..run.engine import Interrupted
from .fit import FitSettings, fit

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Fit as the command line says; returns the exit status, 128 and the signal's number for a stopped run."""
    if arguments.device not in ("cpu", "cuda"):
        raise LoftUpError(
            f"--device {arguments.device}: a training takes cpu or cuda; choose among several by CUDA_VISIBLE_DEVICES"
        )
    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    backbone = {
        "name": arguments.backbone,
        "weights": arguments.backbone_weights,
        "layer": arguments.layer,
        "mean": arguments.mean,
        "std": arguments.std,
        "views": arguments.views,
        "options": dict(arguments.option),
    }
    overrides = [f"seed={arguments.seed}", f"data.workers={arguments.workers}", *arguments.set]
    settings = FitSettings(arguments.output, arguments.minutes, arguments.steps, overrides)
    try:
        outcome = fit(settings, backbone, [str(path) for path in arguments.pictures], resume=arguments.resume)
    except Interrupted as stop:
        print(f"loftup fit: {stop}", file=sys.stderr)
        return stop.status
    if outcome.gained:
        print(f"gained: the weights after {outcome.name.replace('_', ' ')} are in {arguments.output}", file=sys.stderr)
        print("these errors stand for no task: compare with any on your own, as by loftup eval", file=sys.stderr)
    else:
        worse = f" ({outcome.refused} was better on the pictures to choose by alone)" if outcome.refused else ""
        print(f"no gain: these are the weights of any{worse}, in {arguments.output}", file=sys.stderr)
    return 0
