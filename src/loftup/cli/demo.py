"""The command ``loftup demo``: one picture that shows what an upsampler does."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PHOTO", "run"]

PHOTO = Path(__file__).parent.parent / "bundled" / "photo" / "photo.jpg"


def run(arguments: argparse.Namespace, models: Callable[..., Any], upsampled: Callable[..., Any]) -> int:
    """Write the picture; returns the exit status.

    Args:
        arguments: of the command.
        models: arguments and names of weights to a backbone and upsamplers.
        upsampled: arguments, backbone, upsamplers and a picture to features and upsampled ones.

    Raises:
        ValueError: options of a backbone without the backbone; a file or name that cannot be used.
    """
    import torch.nn.functional as F

    from ..pictures import check_suffix, open_picture, require_pillow
    from ..viz import compare

    pil = require_pillow()
    check_suffix(arguments.output)
    picture = open_picture(arguments.image or PHOTO)
    names = _names(arguments)
    backbone, ups = models(arguments, *names)
    start = time.perf_counter()
    low, dense = upsampled(arguments, backbone, ups, picture)
    seconds = time.perf_counter() - start
    size = tuple(dense[0].shape[-2:])
    name = backbone.name or arguments.backbone
    if arguments.backbone_weights:
        name = name.partition(".")[0]  # the tag tells timm's weights
    maps = {
        f"{name} {low.shape[-2]}x{low.shape[-1]}": low,
        "bilinear": F.interpolate(low.float(), size, mode="bilinear", align_corners=False),
        **{_caption(weights): high for weights, high in zip(names, dense, strict=True)},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    shown = picture.resize(size[::-1], pil.Resampling.BICUBIC)
    compare(shown, maps).save(arguments.output)
    print(
        f"{arguments.backbone}: {tuple(low.shape[1:])} -> {tuple(dense[0].shape[1:])} in {seconds:.1f} s; "
        f"wrote {arguments.output}"
    )
    return 0


def _names(arguments: argparse.Namespace) -> list[str]:
    """The weights to show; where no backbone is named, it becomes the one in the package, and a line says so."""
    from ..weights.bundled import ANY, TINY

    if arguments.backbone is not None:
        return [arguments.weights or arguments.backbone]
    of_backbone = ("backbone_weights", "layer", "option", "mean", "std")
    if given := [name for name in of_backbone if getattr(arguments, name) not in (None, [])]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options} without --backbone: name the backbone too, such as --backbone dinov2_vits14")
    arguments.backbone = TINY
    names = [arguments.weights] if arguments.weights else [ANY, TINY]
    weights = "" if arguments.weights else f" and the LoftUp weights {ANY!r} and {TINY!r}"
    print(
        f"Using what comes in the package: the backbone {TINY!r}{weights}. "
        "For published ones, from the Hub: loftup demo --backbone dinov2_vits14"
    )
    return names


def _caption(weights: str) -> str:
    from ..weights.bundled import ANY, BUNDLED
    from ..weights.names import stands_in

    name = ANY if stands_in(weights) else weights
    return f"LoftUp {name}" if name in BUNDLED else "LoftUp"
