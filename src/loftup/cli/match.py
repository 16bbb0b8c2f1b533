"""The command ``loftup match``: points of one photograph found in another."""

import argparse
import csv
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import MADE_BY, refuse_others, sweep, write_atomically
from .demo import package_or_named
from .options import add_model_options, number, place, positive

if TYPE_CHECKING:
    from ..matching import Matches

__all__ = ["add_parser"]

MOST = 50
SHOWN = 640  # pixels of the height of the first picture in the drawing, at most


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "match",
        help="matching points of two photographs, drawn and as numbers",
        description="Finds points of one photograph in another by their upsampled features, and draws both side by "
        "side with a line for each pair. Without --points: the points of a grid that are each other's nearest, the "
        "most alike of every part of the picture. Coordinates are (x, y) in pixels of the files, upright, centres at "
        "whole numbers.",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("first", type=place, metavar="A", help="photograph")
    add("second", type=place, metavar="B", help="photograph to look in")
    add_model_options(parser, backbone=None)
    said = "points of A to find in B, in place of a grid; also those whose way back ends elsewhere, drawn with a cross"
    add("--points", nargs="+", type=point, metavar="X,Y", help=said)
    add("--most", type=positive, metavar="N", help=f"matches of the grid, evenly spread over A (default: {MOST})")
    add("--step", type=positive, default=8, metavar="N", help="pixels of the result between points (default: 8)")
    replaced = "(default: %(default)s); replaced only where loftup made it"
    add("-o", "--output", type=place, default=Path("loftup_match.png"), metavar="FILE", help=f"the drawing {replaced}")
    add("--csv", type=place, metavar="FILE", help="write a line for each match: coordinates, cosine, mutual or not")
    add("--json", type=place, metavar="FILE", help="write the same as JSON, which loftup eval reads as a pair")


def point(given: str) -> tuple[float, float]:
    """Read X,Y."""
    x, comma, y = given.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"expected a point as X,Y such as 120,85.5, got {given!r}")
    return number(x), number(y)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from ..matching import match
    from ..pictures import check_suffix, encode, open_picture
    from ..viz import matches
    from .models import load_models, picture_inputs

    kind = check_suffix(arguments.output)
    _check(arguments)
    pictures = [open_picture(path) for path in (arguments.first, arguments.second)]
    for x, y in arguments.points or ():
        width, height = pictures[0].size
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            last = f"{width - 1},{height - 1}"
            raise ValueError(f"--points {x:g},{y:g} is outside {arguments.first}; expected 0,0 to {last}")
    backbone, up = load_models(arguments, package_or_named(arguments))
    start = time.perf_counter()
    inputs = [picture_inputs(arguments, backbone, picture) for picture in pictures]
    (features, image, size), (other_features, other_image, other_size) = inputs
    points = None if arguments.points is None else torch.tensor(arguments.points, dtype=torch.float64)
    most = None if points is not None else arguments.most or MOST
    pairs = match(
        up,
        features,
        image,
        other_features,
        other_image,
        points,
        size=size,
        other_size=other_size,
        step=arguments.step,
        most=most,
    )
    seconds = time.perf_counter() - start
    correct = None if points is None or bool(pairs.mutual.all()) else pairs.mutual
    height = min(SHOWN, pictures[0].height)
    sheet = matches(pictures[0], pictures[1], pairs.points, pairs.targets, correct=correct, height=height)
    written = {arguments.output: encode(sheet, kind)}
    if arguments.csv is not None:
        written[arguments.csv] = _lines(pairs)
    if arguments.json is not None:
        written[arguments.json] = _record(arguments, pairs)
    for path, content in written.items():
        sweep(path.parent, older=3600)
        write_atomically(path, content)
    sure = int(pairs.mutual.sum())
    counted = f"{len(pairs)} matches" if points is None else f"{len(pairs)} points, {sure} of them mutual matches"
    print(f"{arguments.backbone}: {counted} in {seconds:.1f} s; wrote {', '.join(map(str, written))}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and files that are the user's."""
    if arguments.points is not None and arguments.most is not None:
        raise ValueError("--most chooses among the matches of a grid, and --points keeps every one; leave one out")
    targets = [path for path in (arguments.output, arguments.csv, arguments.json) if path is not None]
    if len({path.absolute() for path in targets}) < len(targets):
        raise ValueError("-o, --csv and --json name one file; give each its own")
    refuse_others(targets)


def _rows(pairs: "Matches") -> list[tuple[float, float, float, float, float, bool]]:
    """Numbers of every match, coordinates to a hundredth of a pixel."""
    places = zip(pairs.points.tolist(), pairs.targets.tolist(), strict=True)
    values = zip(places, pairs.similarity.tolist(), pairs.mutual.tolist(), strict=True)
    return [(*(round(n, 2) for n in (*a, *b)), round(cosine, 4), mutual) for (a, b), cosine, mutual in values]


def _lines(pairs: "Matches") -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["source_x", "source_y", "target_x", "target_y", "similarity", "mutual"])
    table.writerows((*numbers, int(mutual)) for *numbers, mutual in _rows(pairs))
    return text.getvalue().encode()


def _record(arguments: argparse.Namespace, pairs: "Matches") -> bytes:
    rows = _rows(pairs)
    record = {
        "made_by": MADE_BY,
        "source": str(arguments.first),
        "target": str(arguments.second),
        "source_points": [row[:2] for row in rows],
        "target_points": [row[2:4] for row in rows],
        "similarity": [row[4] for row in rows],
        "mutual": [row[5] for row in rows],
    }
    return (json.dumps(record, indent=1) + "\n").encode()
