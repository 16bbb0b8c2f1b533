"""A training run as a config: its sections and their bounds, read from YAML and the command line."""

from .check import check
from .schema import (
    BackboneConfig,
    DataConfig,
    ModelConfig,
    MultiViewConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
    ready_configs,
    to_yaml,
)
from .several import backbone_configs, backbone_list, backbone_sections

__all__ = [
    "BackboneConfig",
    "DataConfig",
    "ModelConfig",
    "MultiViewConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "TrainConfig",
    "backbone_configs",
    "backbone_list",
    "backbone_sections",
    "check",
    "load_config",
    "ready_configs",
    "to_yaml",
]
