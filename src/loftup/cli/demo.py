"""The command ``loftup demo``: one picture that shows what an upsampler does."""

import argparse
import time
from pathlib import Path
from typing import Any

from ..files import refuse_others, sweep, write_atomically
from ..weights.catalogue import ANY, TINY
from .options import add_model_options, place

__all__ = ["PHOTO", "add_parser", "package_or_named"]

VIEWS_OF_TINY = 4  # cheap there, and the picture is the sharper for it
PHOTO = Path(__file__).parent.parent / "bundled" / "photo" / "photo.jpg"


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "demo", help="picture of an image's features: low-res, bilinear, upsampled; needs no network as it stands"
    )
    parser.set_defaults(run=_run)
    parser.add_argument("image", nargs="?", type=place, metavar="IMAGE", help="photograph; default: one in the package")
    add_model_options(parser, backbone=None)
    replaced = "(default: %(default)s); replaced only where a demo made it"
    add = parser.add_argument
    add("-o", "--output", type=place, default=Path("loftup_demo.png"), metavar="FILE", help=replaced)


def _run(arguments: argparse.Namespace) -> int:
    import torch.nn.functional as F

    from ..pictures import check_suffix, encode, open_picture, require_pillow
    from ..viz import compare
    from .models import load_models, upsample_picture

    pil = require_pillow()
    kind = check_suffix(arguments.output)
    refuse_others([arguments.output])
    picture = open_picture(arguments.image or PHOTO)
    weights = package_or_named(arguments)
    backbone, up = load_models(arguments, weights)
    start = time.perf_counter()
    low, dense = upsample_picture(arguments, backbone, up, picture)
    seconds = time.perf_counter() - start
    size = (dense.shape[-2], dense.shape[-1])
    name = backbone.name or arguments.backbone
    if arguments.backbone_weights:
        name = name.partition(".")[0]  # the tag tells timm's weights
    maps = {
        f"{name} {low.shape[-2]}x{low.shape[-1]}": low,
        "bilinear": F.interpolate(low.float(), size, mode="bilinear", align_corners=False),
        _caption(weights): dense,
    }
    sheet = compare(picture.resize(size[::-1], pil.Resampling.BICUBIC), maps)
    sweep(arguments.output.parent, older=3600)
    write_atomically(arguments.output, encode(sheet, kind))
    shapes = f"{tuple(low.shape[1:])} -> {tuple(dense.shape[1:])}"
    print(f"{arguments.backbone}: {shapes} in {seconds:.1f} s; wrote {arguments.output}")
    return 0


def package_or_named(arguments: argparse.Namespace) -> str:
    """The weights to show; where no backbone is named, it becomes the one in the package, and a line says so."""
    if arguments.views is None:
        arguments.views = VIEWS_OF_TINY if arguments.backbone is None else 1
    if arguments.backbone is not None:
        return str(arguments.weights or arguments.backbone)
    of_backbone = ("backbone_weights", "layer", "option", "mean", "std")
    strays = [name for name in of_backbone if getattr(arguments, name) not in (None, [])]
    if options := ", ".join(f"--{name.replace('_', '-')}" for name in strays):
        raise ValueError(f"{options} without --backbone: name the backbone too, such as --backbone dinov2_vits14")
    arguments.backbone = TINY
    weights = "" if arguments.weights else f" and the upsampler {ANY!r}"
    print(
        f"Using what comes in the package: the backbone {TINY!r}{weights}. "
        "For published ones, from the Hub: loftup demo --backbone dinov2_vits14"
    )
    return str(arguments.weights or ANY)


def _caption(weights: str) -> str:
    from ..weights.names import resolve

    checkpoint = resolve(weights).checkpoint
    return ANY if checkpoint is not None and checkpoint.name == ANY else "LoftUp"
