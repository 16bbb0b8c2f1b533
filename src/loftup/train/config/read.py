"""Configs in YAML and on the command line."""

import dataclasses
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import LoftUpError, translate
from ...weights.catalogue import FOLDER
from .check import near, validated
from .schema import TrainConfig

__all__ = ["load_config", "ready_configs", "to_yaml"]

READY = files("loftup.train.config") / "ready"


def ready_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(Path(file.name).stem for file in READY.iterdir() if file.name.endswith(".yaml"))


def load_config(source: "str | os.PathLike[str]", overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's config from YAML; what the file leaves out has the defaults of :class:`TrainConfig`.

    Args:
        source: a YAML file, or one of :func:`ready_configs`.
        overrides: ``"optimizer.rate=1e-3"`` and so on, which win over the file. Values are YAML; lists are written
            ``"data.path=[photos,more]"``; one of several backbones is changed by ``"backbones[0].layer=3"``. Another
            ``backbone.name`` than the file's also drops its layer, weights, mean, std and options.

    Returns:
        The config, checked by :func:`loftup.train.config.check`.

    Raises:
        LoftUpError: there is no such file, it is not YAML, a key is unknown, a value is of the wrong type or out of
            range, or omegaconf is missing (extra ``train``).
    """
    with translate(ImportError, 'training configs need omegaconf: pip install "loftup[train]"'):
        from omegaconf import DictConfig, OmegaConf
    file = _find(source)
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise LoftUpError(f"override {override!r}, expected key=value, such as optimizer.rate=1e-3")
        changes[key] = value
    where = str(source)
    try:
        content = OmegaConf.create(file.read_text("utf-8").replace("<package>", FOLDER.as_posix()))
        if not isinstance(content, DictConfig):
            raise ValueError(f"it holds {OmegaConf.to_container(content)}, expected keys and values such as backbone")
        for key, value in changes.items():
            if re.fullmatch(r"backbone(s\[\d+\])?\.name", key):
                _forget_backbone(OmegaConf.select(content, key.removesuffix(".name")), value)
        tree: Any = OmegaConf.merge(dataclasses.asdict(TrainConfig()), content)
        where = "the command line"
        for key, value in changes.items():
            entry = re.match(r"(.+?)\[(\d+)\]", key)
            if entry and int(entry[2]) >= (count := len(OmegaConf.select(tree, entry[1], default=()))):
                raise ValueError(
                    f"it changes {entry[0]}, but there are {count}, counted from 0; give the whole list: "
                    f"{entry[1]}=[...]"
                )
            # OmegaConf reads the value alone, for the key may name an entry of a list.
            value = OmegaConf.from_dotlist([f"value={value}"]).value
            OmegaConf.update(tree, key, value, merge=OmegaConf.is_dict(OmegaConf.select(tree, key)))
        where = f"{source} and the command line" if changes else str(source)
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except Exception as error:  # omegaconf and its YAML reader each raise their own
        raise LoftUpError(f"cannot use the config in {where}: {_reason(error)}") from error

    def origin(key: str) -> str:
        return "the command line" if any(f"{key}.".startswith((f"{c}.", f"{c}[")) for c in changes) else str(source)

    return validated(values, origin)


def _forget_backbone(section: Any, name: str) -> None:
    """Drop what a file says of a backbone where the command line puts another in its place."""
    if section is not None and section.get("name") != name:
        for key in ("weights", "layer", "mean", "std", "options"):
            section.pop(key, None)


def to_yaml(config: TrainConfig) -> str:
    """The whole config as YAML that :func:`load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _find(source: "str | os.PathLike[str]") -> Any:
    if (path := Path(source).expanduser()).is_file():
        return path
    ready = ready_configs()
    if str(source) in ready:
        return READY / f"{source}.yaml"
    raise LoftUpError(
        f"no config {str(source)!r}: there is no such file; {near(str(source), ready)}Ready configs: {', '.join(ready)}"
    )


def _reason(error: Exception) -> str:
    text = str(error).partition("\n    reference_type")[0].partition("\n    object_type")[0]
    return " ".join(text.replace("full_key:", "at the key").split())
