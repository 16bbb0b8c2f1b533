"""The model card of a finished run: what was trained, on what, how, and what came out."""

import copy
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch

from ...errors import LoftUpError
from ...files import MADE_BY
from ...networks.config import Config
from ...version import __version__
from ...weights.files import model_card
from ...weights.hub import upload
from ...weights.names import CONFIG, SAFETENSORS
from ..baselines import card as baseline_card
from ..config import BackboneConfig, TrainConfig, to_yaml
from .folder import CARD

__all__ = ["how_to_load", "portable", "push", "training_card", "versions"]


def versions() -> dict[str, str]:
    """Versions of what decides about the numbers."""
    return {"loftup": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def training_card(config: TrainConfig, up: Config, facts: Mapping[str, Any], measured: Mapping[str, float]) -> str:
    """README.md of the weights: :func:`loftup.weights.files.model_card` and the recipe.

    ``facts`` are rows of the first table, such as the number of pictures, ``measured`` the last numbers of the
    validation, if any.
    """
    source = config.hub or f"./{Path(config.output).expanduser().resolve().name}"
    text = _card(up, source, config).rstrip()
    sources = ", ".join(map(portable, [*config.validation.path, *filter(None, [config.validation.probe])]))
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    rows = {**facts, **_trained_on(config), "versions": numbers}
    parts = [
        text,
        "## Training",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    if measured:
        each = "`ratio_0` and so on: of every backbone alone; " if len(config.backbones) > 1 else ""
        parts += [
            f"Measured on the validation pictures ({sources}) after the last step "
            "(`loss`: squared distance to features interpolated "
            "bicubically and refined by masks; `bicubic`: the same without the network; `ratio`: one over the other; "
            f"{each}`miou` and so on: a linear probe, in percent):",
            "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value:.4g} |" for name, value in measured.items()),
        ]
    parts += [
        "The whole config, to train the same again with `loftup train`:",
        f"```yaml\n{to_yaml(_shareable(config))}```",
        f"<!-- {MADE_BY} -->",
    ]
    return "\n\n".join(parts) + "\n"


def portable(path: str) -> str:
    """A path as others may see it: an absolute one, which holds on one machine only, by its last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _shareable(config: TrainConfig) -> TrainConfig:
    config = copy.deepcopy(config)
    for section, name in (
        *((backbone, "weights") for backbone in config.sections.values()),
        (config.model, "pretrained"),
        (config.data, "path"),
        (config.data, "cache"),
        (config.validation, "path"),
        (config.validation, "probe"),
        (config, "output"),
    ):
        value = getattr(section, name)
        if value is not None:
            setattr(section, name, portable(value) if isinstance(value, str) else list(map(portable, value)))
    return config


def _card(up: Config, source: str, config: TrainConfig) -> str:
    """The model card, with the run's backbone, or the first of several, in it."""
    backbone = _backbone(next(iter(config.sections.values())))
    if not config.model.baseline:
        line = "from loftup import LoftUp\n"
        return model_card(up, source).replace(line, f"from loftup import LoftUp, load_backbone\n\n{backbone}")
    line = "from loftup.eval.upsamplers import create\n"
    return baseline_card(cast(Any, up), source).replace(line, f"from loftup import load_backbone\n{line}\n{backbone}")


def _trained_on(config: TrainConfig) -> dict[str, str]:
    """The row that names the backbones that a universal upsampler has seen; none for a network of one backbone."""
    if not config.model.universal:
        return {}
    calls = (_backbone(each).removeprefix("backbone = ").partition("  #")[0] for each in config.sections.values())
    return {"backbones": ", ".join(f"`{call}`" for call in calls)}


def _backbone(section: BackboneConfig) -> str:
    """The line that makes a backbone."""
    options = {"layer": section.layer, "mean": section.mean, "std": section.std, **section.options}
    options["views"] = section.views if section.views > 1 else None
    arguments = [repr(section.name), *(f"{name}={value!r}" for name, value in options.items() if value is not None)]
    comment = ""
    if section.weights is not None:
        arguments.insert(1, f"weights={Path(section.weights).name!r}")
        comment = "  # weights: your file"
    return f"backbone = load_backbone({', '.join(arguments)}){comment}"


def how_to_load(config: TrainConfig, folder: Path) -> str:
    """The expression that loads the weights of a run's folder."""
    if not config.model.baseline:
        # A relative path is told from a repository of the Hub by its dot.
        path = str(folder) if folder.is_absolute() or str(folder).startswith(".") else f"./{folder}"
        return f"LoftUp.from_pretrained({path!r})"
    return f"loftup.eval.upsamplers.create({f'{config.model.architecture}:{folder}'!r}, backbone)"


def machine(device: torch.device, processes: int) -> str:
    """The kind of device, and the number of processes."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{processes} x {kind}" if processes > 1 else kind


def push(folder: Path, repo: str) -> str:
    """Upload weights, config and card of a run's folder, and nothing else; returns the commit's address.

    Raises:
        LoftUpError: the Hub refuses or cannot be reached; the folder is as it was.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for name in (SAFETENSORS, CONFIG, CARD):
            shutil.copy(folder / name, temporary)
        try:
            return upload(temporary, repo, private=False, token=None, commit_message="Add LoftUp weights")
        except LoftUpError as error:
            remedy = f"push them with --resume --push-to-hub {repo}"
            raise LoftUpError(f"{error}. The weights are in {folder}; {remedy}") from error
