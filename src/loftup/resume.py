"""Which features files are finished: what they were made from, as their metadata has it."""

import argparse
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import __version__
from .bundled import BUNDLED, TINY
from .published import find_checkpoint
from .weights import CONFIG, PICKLE, SAFETENSORS

__all__ = ["finished", "settings_of", "stamp"]


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What decides the content of a features file, as safetensors metadata."""
    own = "in the package" if arguments.backbone == TINY else "from the Hub"
    return {
        "backbone": arguments.backbone,
        "backbone_weights": _identity(arguments.backbone_weights) if arguments.backbone_weights else own,
        "weights": _identity(arguments.weights or arguments.backbone, known=True),
        "layer": "last" if arguments.layer is None else str(arguments.layer),
        "options": json.dumps(dict(arguments.option), sort_keys=True),
        "scaling": json.dumps([arguments.mean, arguments.std]),
        "asked_size": "x".join(map(str, arguments.size)) if arguments.size else "image",
        "input": str(arguments.input),
        "dtype": arguments.dtype,
        "loftup_version": __version__,
    }


def _identity(source: str, known: bool = False) -> str:
    """A name as it is; a local file or folder with sizes and times, so that another one of its name is told apart.

    Args:
        source: name or path.
        known: names of weights, published or in the package, win over paths, as in
            :meth:`loftup.LoftUp.from_pretrained`.
    """
    path = Path(source).expanduser()
    if (known and (source in BUNDLED or find_checkpoint(source))) or not path.exists():
        return source
    files = [path / name for name in (SAFETENSORS, PICKLE, CONFIG)] if path.is_dir() else [path]
    return " ".join([path.resolve().name, *(stamp(file) for file in files if file.exists())])


def stamp(file: Path) -> str:
    """Size and time of a file, which change with its content."""
    status = file.stat()
    return f"{status.st_size}@{status.st_mtime_ns}"


def finished(target: Path, image: Path, settings: dict[str, str]) -> bool:
    """Whether the file is there, of this image and with these settings; ValueError if it is there with others."""
    if not (target.exists() and image.exists()):
        return False
    settings = {**settings, "image_file": stamp(image)}
    try:
        with safe_open(target, framework="pt") as handle:
            made_with = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{target} exists but is no safetensors file ({error}); remove it or pass --overwrite"
        ) from error
    other = [
        f"{key} {made_with.get(key)!r}, now {value!r}" for key, value in settings.items() if made_with.get(key) != value
    ]
    if other:
        raise ValueError(
            f"{target} was written with other settings ({'; '.join(other)}); pass --overwrite or another folder"
        )
    return True
