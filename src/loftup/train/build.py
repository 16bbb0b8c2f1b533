"""The parts of a run, made from its config."""

import dataclasses

import torch

from ..backbones import Backbone, Upsampled, load_backbone
from ..errors import LoftUpError
from ..model import LoftUp, LoftUpConfig
from .config import TrainConfig
from .data import loader
from .start import calibrate_batch_norm, start_as_interpolator

__all__ = ["build_backbone", "build_upsampler", "calibrate"]

CALIBRATION = 64  # pictures


def build_backbone(config: TrainConfig) -> Backbone:
    """The frozen backbone, in ``eval()`` mode on the CPU; LoftUpError as :func:`loftup.load_backbone`."""
    given = config.backbone
    backbone = load_backbone(
        given.name, weights=given.weights, layer=given.layer, mean=given.mean, std=given.std, **given.options
    )
    return backbone.requires_grad_(False)


def build_upsampler(config: TrainConfig, backbone: Backbone) -> LoftUp:
    """The upsampler with its first weights, on the CPU.

    Random weights follow from the global random state. Batch norms are not calibrated yet, see :func:`calibrate`.

    Raises:
        LoftUpError: ``model.pretrained`` cannot be loaded or expects another number of channels, or the architecture
            does not go with the backbone's.
    """
    model = config.model
    if model.pretrained is not None:
        up = LoftUp.from_pretrained(model.pretrained, dtype=torch.float32)
        Upsampled(backbone, up)  # refuses a pair that does not fit
        up.config = dataclasses.replace(up.config, backbone=backbone.name)
    else:
        try:
            up = LoftUp(
                LoftUpConfig(
                    backbone.channels,
                    position_code=model.position_code,  # type: ignore[arg-type]
                    lr_size=model.lr_size,
                    heads=model.heads,
                    blocks=model.blocks,
                    backbone=backbone.name,
                )
            )
        except ValueError as error:
            raise LoftUpError(f"the section model does not fit {backbone.name!r}: {error}; see model.heads") from error
        if model.start == "interpolator":
            start_as_interpolator(up)
    return up


def calibrate(up: LoftUp, config: TrainConfig, backbone: Backbone) -> None:
    """Set the batch norms of random weights to the statistics of the first pictures of the training data."""
    batches = max(1, CALIBRATION // config.batch)
    data = dataclasses.replace(config.data, workers=0, cache=None)
    alone = dataclasses.replace(config, data=data, steps=batches, accumulate=1)
    calibrate_batch_norm(up, (batch.guidance.to(up.device) for batch in loader(alone, backbone)))
