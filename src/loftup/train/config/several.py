"""A run's backbone or backbones, alike to the rest of the code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...backbones import Backbone

if TYPE_CHECKING:
    from .schema import BackboneConfig, TrainConfig

__all__ = ["backbone_configs", "backbone_list", "backbone_sections"]


def backbone_configs(config: "TrainConfig") -> "list[BackboneConfig]":
    """The sections of all backbones of a run: those of ``config.backbones``, or the single ``config.backbone``."""
    return config.backbones or [config.backbone]


def backbone_sections(config: "TrainConfig") -> "list[tuple[str, BackboneConfig]]":
    """The same with the names by which a message can speak of them: "backbones[0]", or "backbone"."""
    several = [(f"backbones[{index}]", given) for index, given in enumerate(config.backbones)]
    return several or [("backbone", config.backbone)]


def backbone_list(config: "TrainConfig", backbone: Backbone | Sequence[Backbone]) -> list[Backbone]:
    """One backbone or several as a list.

    Raises:
        ValueError: there are not as many as the config has.
    """
    backbones = [backbone] if isinstance(backbone, Backbone) else list(backbone)
    if len(backbones) != (expected := len(backbone_configs(config))):
        raise ValueError(
            f"got {len(backbones)} backbones, the config has {expected}; give one for each of config.backbones, in "
            "their order"
        )
    return backbones
