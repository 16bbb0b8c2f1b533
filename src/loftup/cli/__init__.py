"""The command ``loftup``: demo, features, list, masks, train, eval."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..pictures import IMAGE_SUFFIXES
from ..weights.bundled import ANY, TINY
from .options import add_eval_commands, add_mask_options, add_model_options

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..backbones import Backbone
    from ..model import LoftUp

__all__ = ["main"]

# What a user's files, names and machine can cause: LoftUpError is a ValueError, torch's out-of-memory a RuntimeError.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)

IN_PACKAGE: tuple[dict[str, Any], ...] = (  # in the fields of published.Checkpoint; None for any
    {"name": ANY, "channels": None, "patch_size": None, "licence": "MIT", "backbones": ["any"]},
    {"name": TINY, "channels": 192, "patch_size": 16, "licence": "MIT", "backbones": [TINY]},
)


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
        print(f"loftup {arguments.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; files already written are whole, run again to resume" * (
            arguments.command in ("features", "masks", "eval")
        )
        print(f"\nloftup {arguments.command}: interrupted{again}", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loftup", description="Pixel-dense features from any vision backbone.")
    parser.add_argument("--version", action="version", version=f"loftup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="picture of an image's features: low-res, bilinear, LoftUp; needs no network as it stands",
    )
    demo.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="photograph; default: one in the package")
    add_model_options(demo, backbone=None)
    demo.add_argument("-o", "--output", type=Path, default=Path("loftup_demo.png"), metavar="FILE")
    demo.set_defaults(run=_demo)

    features = commands.add_parser("features", help="write upsampled features of images as float16 safetensors")
    features.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files or folders of them")
    add_model_options(features)
    features.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    features.add_argument("--overwrite", action="store_true", help="write files anew that are there already")
    features.set_defaults(run=_features)

    listing = commands.add_parser("list", help="weights: published ones, and those in the package")
    listing.add_argument("--json", action="store_true", help="as JSON, with all fields")
    listing.set_defaults(run=_list)

    masks = commands.add_parser("masks", help="make class-agnostic masks of pictures, to train on")
    add_mask_options(masks)
    masks.set_defaults(run=_masks)

    train = commands.add_parser("train", help="train an upsampler for a backbone")
    train.add_argument("config", metavar="CONFIG", help="YAML file, or a ready config such as quick_cpu")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace values of it: optimizer.rate=1e-3")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    train.add_argument("--push-to-hub", metavar="REPO", help="upload the weights at the end; same as hub=REPO")
    train.set_defaults(run=_train)

    evaluation = commands.add_parser("eval", help="compare upsamplers on segmentation, depth, tracking and more")
    add_eval_commands(evaluation)
    evaluation.set_defaults(run=_eval)
    return parser


def _models(arguments: argparse.Namespace, *names: str) -> "tuple[Backbone, list[LoftUp]]":
    """Backbone and upsamplers on the device, checked against each other.

    Args:
        arguments: of the command; ``arguments.backbone`` is the backbone.
        names: of the upsamplers' weights; left out, the one that the options name.
    """
    from ..upsampled import Upsampled
    from ..weights.hub import UnreachableError

    _check_device(arguments.device)
    try:
        ups = [_upsampler(arguments, name) for name in names or (arguments.weights or arguments.backbone,)]
    except UnreachableError as error:
        if arguments.backbone_weights or arguments.backbone == TINY:
            raise
        raise UnreachableError(
            f"{error}. The backbone's weights are needed too{_repository(arguments.backbone)}: give both --weights and "
            "--backbone-weights"
        ) from error
    backbone = backbone_of(arguments)
    for up in ups:
        Upsampled(backbone, up)  # refuses a pair that does not fit, before any work
    return backbone, ups


def _upsampler(arguments: argparse.Namespace, name: str) -> "LoftUp":
    """The upsampler of that name; warnings, such as of a stand-in, are lines of their own on stderr."""
    import torch

    from ..model import LoftUp

    dtype = getattr(torch, arguments.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        up = LoftUp.from_pretrained(name, device=arguments.device, dtype=dtype, strict=arguments.strict)
    for warning in caught:
        text = " ".join(str(warning.message).split()).replace("strict=True", "--strict")
        print(f"loftup {arguments.command}: {text}", file=sys.stderr)
    return up


def backbone_of(arguments: argparse.Namespace) -> "Backbone":
    """The backbone that the options name, on the device."""
    from ..backbones import load_backbone

    backbone = load_backbone(
        arguments.backbone,
        weights=arguments.backbone_weights,
        layer=arguments.layer,
        mean=tuple(arguments.mean) if arguments.mean else None,
        std=tuple(arguments.std) if arguments.std else None,
        **dict(arguments.option),
    )
    return backbone.eval().to(arguments.device)


def _check_device(device: str) -> None:
    """Raise ValueError unless torch can use the device here and now."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(
            f"cannot use the device {device!r}: {str(error).splitlines()[0]}; expected cpu, cuda, cuda:1 or another "
            "device that torch has here"
        ) from error


def _repository(backbone: str) -> str:
    """Where timm would fetch a backbone from, for the message."""
    import timm

    from ..backbones.load import resolve

    config = timm.get_pretrained_cfg(resolve(backbone)[0])
    return f", from the Hub repository {config.hf_hub_id!r}" if config and config.hf_hub_id else ""


def _run(
    arguments: argparse.Namespace, backbone: "Backbone", ups: "Sequence[LoftUp]", image: Any
) -> "tuple[Tensor, list[Tensor]]":
    """Features of a PIL image or path, (1, C, h, w), and what each upsampler makes of them, (1, C, H, W)."""
    import torch

    large = backbone.preprocess(image)
    height, width = large.shape[-2:]
    size = tuple(arguments.size) if arguments.size else _within(height, width, 512)
    scale = arguments.input / min(height, width)
    small = backbone.preprocess(image, size=(max(1, round(height * scale)), max(1, round(width * scale))))
    with torch.inference_mode():
        features = backbone(small.to(arguments.device))
        return features, [up(features, large.to(arguments.device), size=size) for up in ups]


def _within(height: int, width: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    return run(arguments, _models, _run)


def drawn_scene(height: int = 336, width: int = 448) -> "Image.Image":
    """A drawn landscape with sharp outlines, for trying things without a photograph."""
    from ..pictures import require_pillow

    pil = require_pillow()
    from PIL import ImageDraw

    scene = pil.new("RGB", (width, height), (150, 190, 235))
    draw = ImageDraw.Draw(scene)
    horizon = height * 3 // 5
    draw.rectangle((0, horizon, width, height), fill=(95, 140, 70))
    draw.polygon([(0, horizon), (width // 4, height // 4), (width // 2, horizon)], fill=(120, 110, 115))
    draw.polygon([(width // 4, horizon), (width // 2, height // 3), (width * 4 // 5, horizon)], fill=(95, 88, 98))
    draw.ellipse((width * 3 // 4, height // 10, width * 3 // 4 + height // 6, height // 10 + height // 6), fill="gold")
    draw.rectangle((width * 11 // 16, height // 2, width * 13 // 16, height * 3 // 4), fill=(180, 70, 60))
    draw.polygon(
        [(width * 21 // 32, height // 2), (width * 3 // 4, height * 3 // 8), (width * 27 // 32, height // 2)],
        fill=(110, 50, 40),
    )
    for left in range(width // 16, width // 2, width // 9):
        draw.rectangle((left - 3, height * 7 // 10, left + 3, height * 17 // 20), fill=(90, 65, 45))
        draw.ellipse((left - 18, height // 2, left + 18, height * 3 // 4), fill=(40, 95, 45))
    return scene  # type: ignore[no-any-return]


def _features(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .resume import finished, settings_of

    images = list(_expand(arguments.images))
    targets = _targets(images, arguments.output)
    settings = settings_of(arguments)
    waiting = [image for image in images if arguments.overwrite or not finished(targets[image], image, settings)]
    if skipped := len(images) - len(waiting):
        print(f"{skipped} of {len(images)} images are finished already", file=sys.stderr)
    if not waiting:
        return 0
    backbone, ups = _models(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for image in tqdm(waiting, unit="image", desc=arguments.backbone, disable=None):
        try:
            _write_features(arguments, backbone, ups, image, targets[image], settings)
        except FAILURES as error:
            failed += 1
            tqdm.write(f"loftup features: {image}: {_one_line(error)}", file=sys.stderr)
    print(f"wrote {len(waiting) - failed} of {len(waiting)} files to {arguments.output}", file=sys.stderr)
    return 1 if failed else 0


def _write_features(
    arguments: argparse.Namespace,
    backbone: "Backbone",
    ups: "Sequence[LoftUp]",
    image: Path,
    target: Path,
    settings: dict[str, str],
) -> None:
    import torch
    from safetensors.torch import save

    from ..files import stamp, write_atomically
    from ..pictures import open_picture

    read = {"image": image.name, "image_file": stamp(image)}
    _, (high,) = _run(arguments, backbone, ups, open_picture(image))
    half = high[0].to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(f"features reach {high.abs().max():.3g}, beyond what float16 holds")
    metadata = {**settings, **read, "size": f"{half.shape[-2]}x{half.shape[-1]}"}
    write_atomically(target, save({"features": half.cpu().contiguous()}, metadata=metadata))


def _expand(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as given, folders as the images directly in them, each once; an empty folder is an error."""
    seen = set()
    for path in _files(paths):
        # The name is kept: two links to one file are two images.
        if (place := path.parent.resolve() / path.name) not in seen:
            seen.add(place)
            yield path


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"no images in the folder {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        yield from found


def _targets(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    targets = {image: folder / f"{image.name}.safetensors" for image in images}
    sources: dict[Path, Path] = {}
    for image, target in targets.items():
        if target in sources:
            raise ValueError(
                f"{sources[target]} and {image} would both be written to {target}; run them to two folders"
            )
        sources[target] = image
    return targets


def _list(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    from ..weights.catalogue import Checkpoint, list_pretrained

    if arguments.json:
        unknown = {field.name: None for field in fields(Checkpoint)}
        entries = [{**asdict(checkpoint), "in_package": False} for checkpoint in list_pretrained()]
        entries += [{**unknown, **weights, "in_package": True} for weights in IN_PACKAGE]
        print(json.dumps(entries, indent=2))
        return 0
    rows = [("NAME", "C", "PATCH", "HUB REPOSITORY", "LICENCE", "BACKBONE (timm)")]
    rows += [(c.name, str(c.channels), str(c.patch_size), c.repo, c.licence, c.timm) for c in list_pretrained()]
    for weights in IN_PACKAGE:
        channels, patch_size = (str(weights[key] or "any") for key in ("channels", "patch_size"))
        rows.append(
            (weights["name"], channels, patch_size, "in the package", weights["licence"], *weights["backbones"])
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _masks(arguments: argparse.Namespace) -> int:
    from ..train.masks.command import run

    if arguments.sam:
        _check_device(arguments.device)
    return run(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from ..train.run.command import run

    return run(arguments)


def _eval(arguments: argparse.Namespace) -> int:
    from ..eval.command import run

    if arguments.task not in ("list", "table"):
        _check_device(arguments.device)
    return run(arguments, backbone_of)


if __name__ == "__main__":
    sys.exit(main())
