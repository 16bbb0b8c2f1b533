"""``loftup features`` into shards: Parquet or WebDataset, by this process or by a Ray cluster."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import LoftUpError
from .options import positive, positive_number, word

__all__ = ["add_options", "run", "wanted"]

CLUSTER = ("workers", "cpus", "gpus", "address")  # go with --engine ray
# They make `loftup features` write shards.
TURN = ("engine", "format", "save", "dry_run")
MOST = 1e12  # bytes that are written without --yes
OTHERS = (
    "points",
    "head",
    "masks",
    "keep_images",
    "store",
    "part",
    "batch",
    "column",
    "retry_errors",
    *CLUSTER,
    "price",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to those of ``loftup features``."""
    add = parser.add_argument_group(
        "shards", "one of --engine, --format, --save and --dry-run writes shards in place of a file for every picture"
    ).add_argument
    add("--engine", choices=("local", "ray"), help="this process (default), or a Ray cluster")
    add("--format", choices=("parquet", "webdataset"), help="of the shards (default: parquet)")
    kinds = "features, pooled, points, logits, labels, regions, dense (default: features, upsampled when read)"
    add("--save", type=_kinds, metavar="KIND,...", help=kinds)
    add("--points", nargs=2, type=positive, metavar=("ROWS", "COLUMNS"), help="grid of points to save features at")
    add("--head", type=word, metavar="FILE", help="linear head, safetensors with weight (K, C) and bias (K)")
    add("--masks", type=word, metavar="DIR", help="label maps, PNG, named as the pictures, for regions")
    add("--keep-images", action="store_true", help="store the pictures too, so that the output stands alone")
    add("--store", choices=("float16", "uint8"), help="dtype of the arrays (default: float16)")
    add("--part", type=positive, metavar="N", help="pictures of a shard (default: 256, fewer where it exceeds 256 MB)")
    add("--batch", type=positive, metavar="N", help="pictures of one size computed at once (default: 8)")
    add("--column", type=word, metavar="NAME", help="of Parquet files, with bytes or links")
    add("--retry-errors", action="store_true", help="try the pictures again that failed")
    add("--workers", type=positive, metavar="N", help="processes with networks (default: as many as the cluster holds)")
    add("--cpus", type=positive, metavar="N", help="threads of each worker (default: 1)")
    add("--gpus", type=positive_number, metavar="X", help="GPUs of each worker, such as 1 or 0.5 (default: none)")
    add("--address", type=word, help="of a running Ray cluster; auto: of this machine (default: start one here)")
    add(
        "--dry-run",
        action="store_true",
        help="try some pictures; say how long all take, how large and how dear they are",
    )
    add(
        "--price", type=positive_number, metavar="X", help="of an hour of the machine with these workers, for --dry-run"
    )


def _kinds(given: str) -> tuple[str, ...]:
    return tuple(word(given).split(","))


def wanted(arguments: argparse.Namespace) -> bool:
    """Tell whether shards are asked for; ValueError for options that go with shards alone."""
    if any(getattr(arguments, name) for name in TURN):
        return True
    if arguments.output and (Path(arguments.output) / "manifest.json").is_file():
        return True  # goes on with shards
    for name in OTHERS:
        if getattr(arguments, name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} goes with shards; give --format parquet or --engine ray too")
    return False


def run(arguments: argparse.Namespace) -> int:
    """Extract into shards, or estimate; returns 1 where pictures failed."""
    if arguments.overwrite:
        raise ValueError("--overwrite is for a file for every picture; shards go to a new folder, or go on in theirs")
    for name in CLUSTER:
        if getattr(arguments, name) and arguments.engine != "ray" and not (name == "workers" and arguments.dry_run):
            raise ValueError(f"--{name} goes with --engine ray, got --engine {arguments.engine or 'local'}")
    from ..scale.settings import Settings
    from .models import check_backbone

    check_backbone(arguments)
    given = {
        name: getattr(arguments, name) for name in ("save", "store", "format", "batch") if getattr(arguments, name)
    }
    settings = Settings(
        backbone=arguments.backbone,
        backbone_weights=arguments.backbone_weights,
        layer=arguments.layer,
        options=dict(arguments.option),
        mean=tuple(arguments.mean) if arguments.mean else None,
        std=tuple(arguments.std) if arguments.std else None,
        views=arguments.views,
        weights=arguments.weights,
        strict=arguments.strict,
        input=arguments.input,
        size=tuple(arguments.size) if arguments.size else None,
        points=tuple(arguments.points) if arguments.points else None,
        head=arguments.head,
        masks=arguments.masks,
        images=arguments.keep_images,
        dtype=arguments.dtype,
        part=arguments.part,
        **given,
    )
    return _estimate(arguments, settings) if arguments.dry_run else _extract(arguments, settings)


def _estimate(arguments: argparse.Namespace, settings: Any) -> int:
    from ..scale.compute import Extractor
    from ..scale.estimate import estimate
    from ..scale.sources import list_pictures
    from .models import choose_device

    choose_device(arguments)
    places = list(list_pictures(arguments.images, arguments.column))
    result = estimate(Extractor(settings, arguments.device), places, arguments.workers or 1)
    print("\n".join(result.lines(arguments.price)))
    return 0


def _extract(arguments: argparse.Namespace, settings: Any) -> int:
    from ..scale import extract
    from ..scale.engines import Cluster
    from .models import choose_device

    if arguments.price:
        raise ValueError("--price goes with --dry-run")
    if arguments.output is None:
        raise ValueError("-o is missing: the folder for the shards")
    cluster = Cluster(arguments.address, arguments.workers, arguments.cpus or 1, arguments.gpus or 0.0)
    if arguments.engine != "ray":
        choose_device(arguments)
    elif arguments.device:
        raise ValueError(f"--device goes with --engine local, got {arguments.device}; for GPUs of a cluster: --gpus 1")
    summary = extract(
        arguments.images,
        arguments.output,
        settings,
        engine=arguments.engine or "local",
        cluster=cluster,
        device=arguments.device,
        column=arguments.column,
        retry_errors=arguments.retry_errors,
        most=None if arguments.yes else MOST,
    )
    text = f"{summary.written} of {summary.pictures} pictures are in {arguments.output}"
    if summary.parts:
        count = sum(part["pictures"] for part in summary.parts)
        text += f"; {count} of them now, {count / summary.seconds:.3g} a second"
    print(text, file=sys.stderr)
    if summary.failed:
        print(
            f"{summary.failed} failed, named in {arguments.output}/errors; --retry-errors tries again", file=sys.stderr
        )
    if summary.written + summary.failed < summary.pictures:
        raise LoftUpError(f"{summary.pictures - summary.written - summary.failed} pictures are missing; start again")
    return 1 if summary.failed else 0
