"""The parts of a run, made from its config."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch

from ...backbones import Backbone, load_backbone
from ...errors import LoftUpError
from ...model import LoftUp
from ...networks.config import LoftUpConfig, UniversalConfig, read_config
from ...upsampled import Upsampled
from ...weights.hub import UnreachableError
from ..baselines import LearnedConfig, build
from ..config import ModelConfig, ObjectiveConfig, TrainConfig
from ..data.loader import loader
from ..data.shards import is_pattern
from ..objective.start import calibrate_batch_norm, start_as_interpolator

__all__ = ["build_backbones", "build_upsampler", "calibrate", "check_paths", "rebuild"]

CALIBRATION = 64  # pictures


def check_paths(config: TrainConfig) -> None:
    """Raise LoftUpError, which names the key, for a folder or file of the config that is not there."""
    data, validation = config.data, config.validation
    for key, paths, remedy in (
        ("data.path", data.path, "data.path=[FOLDER]"),
        ("validation.path", validation.path, "validation.path=[FOLDER], or validation.path=[] for none"),
        ("validation.probe", filter(None, [validation.probe]), "validation.probe=FOLDER, or validation.probe=null"),
    ):
        for path in paths:
            if not is_pattern(path) and not (folder := Path(path).expanduser()).is_dir():
                what = "is a file" if folder.exists() else "is not there"
                raise LoftUpError(f"{key} names {path}, which {what}, expected a folder; set {remedy}")
    for section, backbone in config.sections.items():
        weights = backbone.weights
        if weights is not None and not Path(weights).expanduser().is_file():
            raise LoftUpError(
                f"{section}.weights names {weights}, which is no file; set {section}.weights=FILE, or "
                f"{section}.weights=null for the published ones"
            )


def build_backbones(config: TrainConfig) -> list[Backbone]:
    """The frozen backbones, in ``eval()`` mode on the CPU; LoftUpError as :func:`loftup.load_backbone`."""
    return [
        load_backbone(
            each.name,
            weights=each.weights,
            layer=each.layer,
            mean=each.mean,
            std=each.std,
            views=each.views,
            **each.options,
        )
        for each in config.sections.values()
    ]


def build_upsampler(config: TrainConfig, backbone: Backbone) -> LoftUp:
    """The upsampler with its first weights, on the CPU; :class:`Objective` makes them trainable.

    Random weights follow from the global random state. Batch norms are not calibrated yet, see :func:`calibrate`.

    Args:
        config: of the run.
        backbone: that it is for; without effect with ``model.architecture="any"``.

    Raises:
        LoftUpError: ``model.pretrained`` cannot be loaded, expects another number of channels or is of another
            ``model.architecture``, or the section ``model`` does not go with the backbone.
    """
    model = config.model
    if model.baseline:
        up = rebuild({"architecture": model.architecture, "channels": backbone.channels, "backbone": backbone.name})
    elif model.pretrained is not None:
        up = _pretrained(model.pretrained, config, backbone)
    elif model.universal:
        up = LoftUp(_universal(model))
    else:
        up = _published(config, backbone)
    return up


def _universal(model: ModelConfig) -> UniversalConfig:
    return UniversalConfig(
        model.heads,
        model.radius,
        model.code_width,
        model.encoder_width,
        quarter_width=model.quarter_width,
        local=model.local,
        oversampling=model.oversampling,
    )


def _published(config: TrainConfig, backbone: Backbone) -> LoftUp:
    model = config.model
    try:
        up = LoftUp(
            LoftUpConfig(
                backbone.channels,
                position_code=model.position_code,
                lr_size=model.lr_size,
                heads=model.heads,
                blocks=model.blocks,
                backbone=backbone.name,
                trained_on=_features(config, backbone),
            )
        )
    except ValueError as error:
        raise LoftUpError(f"the section model does not fit {backbone.name!r}: {error}; see model.heads") from error
    if model.start == "interpolator":
        start_as_interpolator(up, max(2, int(max(config.data.sizes) // backbone.stride)))
    return up


def _pretrained(name: str, config: TrainConfig, backbone: Backbone) -> LoftUp:
    try:
        up = LoftUp.from_pretrained(name, dtype=torch.float32)
    except LoftUpError as error:
        if Path(name).expanduser().exists() or not ("/" in name or name.startswith((".", "~"))):
            raise
        # What the Hub's client says is about other things than a folder that has not been made yet.
        hub = "cannot be asked for such a" if isinstance(error, UnreachableError) else "gives no such"
        raise LoftUpError(
            f"there is no folder or file {name} (model.pretrained), and the Hub {hub} repository; train stage 1 "
            "first, or set model.pretrained=FOLDER of a finished run"
        ) from error
    architecture = "any" if isinstance(up.config, UniversalConfig) else "loftup"
    if architecture != config.model.architecture:
        raise LoftUpError(
            f"model.pretrained={name} holds architecture={architecture}, the config says "
            f"model.architecture={config.model.architecture}; set model.architecture={architecture}, or other weights"
        )
    if isinstance(up.config, UniversalConfig):
        return _grown(up, config.model)
    if isinstance(up.config, LoftUpConfig):
        Upsampled(backbone, up)  # refuses a pair that does not fit
        up.config = dataclasses.replace(up.config, backbone=backbone.name, trained_on=_features(config, backbone))
    return up


def _features(config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """Facts that tell the features of a run's backbone from others of its name, for the weights' config."""
    section = config.backbone
    return {"layer": section.layer, "views": section.views, "options": backbone.options or {}}


def _grown(up: LoftUp, model: ModelConfig) -> LoftUp:
    """The universal network with the parts that the config asks for and its weights lack; they begin as nothing."""
    have = up.config
    assert isinstance(have, UniversalConfig)
    if have.oversampling > model.oversampling:
        raise LoftUpError(
            f"model.pretrained={model.pretrained} averages {have.oversampling} pixels of the image along a side, the "
            f"config says model.oversampling={model.oversampling}; set model.oversampling={have.oversampling}"
        )
    if have.quarter_width not in (0, model.quarter_width) and model.quarter_width:
        raise LoftUpError(
            f"model.pretrained={model.pretrained} has quarter_width={have.quarter_width}, the config says "
            f"model.quarter_width={model.quarter_width}; set model.quarter_width={have.quarter_width}"
        )
    wanted = dataclasses.replace(
        have,
        quarter_width=have.quarter_width or model.quarter_width,
        local=have.local or model.local,
        oversampling=model.oversampling,
    )
    if wanted == have:
        return up
    larger = LoftUp(wanted)
    larger.load_state_dict(up.state_dict(), strict=False)
    return larger


def rebuild(config: dict[str, Any]) -> LoftUp:
    """A network from its config: LoftUp, or one that it is compared with, which has in common what training needs."""
    if "architecture" not in config:
        return LoftUp(read_config(config))
    return cast(LoftUp, build(LearnedConfig.from_dict(config)))


def calibrate(up: LoftUp, config: TrainConfig, backbone: Backbone) -> None:
    """Set the batch norms of random weights to the statistics of the first pictures of the training data."""
    batches = max(1, CALIBRATION // config.batch)
    data = dataclasses.replace(config.data, workers=0, cache=None)
    # Without terms, for the pictures alone are looked at.
    alone = dataclasses.replace(config, data=data, objective=ObjectiveConfig(), steps=batches, accumulate=1)
    calibrate_batch_norm(up, (batch.guidance.to(up.device) for batch in loader(alone, backbone)))
