"""Which features files are finished: what they were made from, as their metadata has it."""

import argparse
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .. import __version__
from ..backbones.tiny import FOLDER
from ..files import stamp
from ..weights.bundled import ANY, BUNDLED, TINY
from ..weights.catalogue import find_checkpoint
from ..weights.files import CONFIG, PICKLE, SAFETENSORS
from ..weights.names import no_weights_for, stands_in

__all__ = ["finished", "settings_of"]


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What decides the content of a features file, as safetensors metadata.

    Raises:
        LoftUpError: with ``strict``, "any" would stand in for weights.
    """
    own = _in_package(FOLDER) if arguments.backbone == TINY else "from the Hub"
    named = arguments.weights or arguments.backbone
    if missing := stands_in(named):
        if arguments.strict:
            raise no_weights_for(f"named {named!r}")
        named = ANY
    weights = _identity(named, known=True) + (" for want of its own" if missing else "")
    return {
        "backbone": arguments.backbone,
        "backbone_weights": _identity(arguments.backbone_weights) if arguments.backbone_weights else own,
        "weights": weights,
        "layer": "last" if arguments.layer is None else str(arguments.layer),
        "options": json.dumps(dict(arguments.option), sort_keys=True),
        "scaling": json.dumps([arguments.mean, arguments.std]),
        "asked_size": "x".join(map(str, arguments.size)) if arguments.size else "image",
        "input": str(arguments.input),
        "dtype": arguments.dtype,
        "loftup_version": __version__,
    }


def _identity(source: str, known: bool = False) -> str:
    """A name as it is; files and folders with what tells them from others of their name.

    Args:
        source: name or path.
        known: names of weights, published or in the package, win over paths, as in
            :meth:`loftup.LoftUp.from_pretrained`.
    """
    path = Path(source).expanduser()
    if known and source in BUNDLED:
        return f"{source} {_in_package(BUNDLED[source])}"
    if (known and find_checkpoint(source)) or not path.exists():
        return source
    files = [path / name for name in (SAFETENSORS, PICKLE, CONFIG)] if path.is_dir() else [path]
    return " ".join([path.resolve().name, *(stamp(file) for file in files if file.exists())])


def _in_package(folder: Path) -> str:
    """Of weights in the package, whose content a new version may change."""
    return f"in the package, {hashlib.sha256((folder / SAFETENSORS).read_bytes()).hexdigest()[:12]}"


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
