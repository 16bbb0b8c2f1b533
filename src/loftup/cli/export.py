"""The command ``loftup export``: backbone and upsampler as graphs for other runtimes."""

import argparse
from pathlib import Path
from typing import Any

from ..files import refuse_others
from ..weights.catalogue import ANY
from .options import add_backbone_options, place, positive, word

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "export",
        help="graphs for other runtimes: ONNX, or torch.export's .pt2",
        description="Writes the upsampler as a graph for ONNX Runtime and others; with --backbone also the backbone, "
        "and both as one graph from image to dense features.",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("upsampler", nargs="?", default=ANY, type=word, help="name, repository, folder or file (default: %(default)s)")
    add("-o", "--output", required=True, type=place, metavar="FOLDER", help="for the files")
    add_backbone_options(parser, None, "none, the upsampler alone is written")
    add("--parts", default="all", choices=("all", "upsampler", "backbone", "whole"), help="default: %(default)s")
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help="that the graphs take alone; default: any")
    add("--format", default="onnx", choices=("onnx", "pt2"), help="default: %(default)s")
    stored = "how ONNX files store the weights (default: %(default)s); the arithmetic is float32"
    add("--store", default="float32", choices=("float32", "float16", "int8"), help=stored)


def _run(arguments: argparse.Namespace) -> int:
    from ..model import LoftUp
    from ..upsampled import Upsampled
    from .models import backbone_of

    if arguments.backbone is None and arguments.parts in ("backbone", "whole"):
        raise ValueError(f"--parts {arguments.parts} needs --backbone NAME")
    arguments.device, arguments.views = "cpu", arguments.views or 1
    wanted = {"all": ("upsampler", "backbone", "whole")}.get(arguments.parts, (arguments.parts,))
    up = LoftUp.from_pretrained(arguments.upsampler) if set(wanted) - {"backbone"} else None
    parts: dict[str, Any] = {}
    if up is not None and "upsampler" in wanted:
        parts["upsampler"] = up
    if arguments.backbone is not None:
        backbone = backbone_of(arguments)
        if "backbone" in wanted:
            parts["backbone"] = backbone
        if up is not None and "whole" in wanted:
            parts["whole"] = Upsampled(backbone, up)
    paths = {name: Path(arguments.output) / f"{name}.{arguments.format}" for name in parts}
    refuse_others(paths.values())  # and a size that does not fit, before minutes of work
    size = tuple(arguments.size) if arguments.size else None
    if "backbone" in parts or "whole" in parts:
        backbone.graph(backbone, size)
    for name, module in parts.items():
        path = paths[name]
        print(f"exporting {path}, up to a minute", flush=True)
        module.export(path, size=size, store=arguments.store)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    return 0
