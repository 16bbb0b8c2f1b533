"""The two networks' architectures: one frozen config each, which cannot hold a wrong state."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

__all__ = ["Config", "LoftUpConfig", "UniversalConfig", "read_config"]


@dataclasses.dataclass(frozen=True)
class LoftUpConfig:
    """Architecture of the published network; the defaults are the published ones.

    Args:
        channels: C of the backbone features.
        position_code: how feature positions are told apart: ``"sine"`` appends a Fourier code (width D = C + 4 *
            feature_frequencies), ``"learnable"`` adds a table of ``lr_size**2`` vectors (D = C).
        lr_size: side of the learnable table; without effect for ``"sine"``.
        heads: attention heads; must divide D.
        blocks: cross-attention blocks.
        image_frequencies: frequencies of the guidance code.
        feature_frequencies: frequencies of the feature-grid code.
        channel_norm: ``"layer"`` normalises the features over C first, as all published weights expect;
            ``"identity"`` takes them as they come.
        backbone: name of the backbone that the weights belong to, for messages; may be empty.
        trained_on: which of its features they learned from: its ``layer``, number of ``views`` and ``options`` for the
            library that it is from; None where that is not known.

    Raises:
        ValueError: a value is out of range, or D is not divisible by ``heads``.
    """

    channels: int
    position_code: Literal["sine", "learnable"] = "sine"
    lr_size: int = 16
    heads: int = 4
    blocks: int = 2
    image_frequencies: int = 20
    feature_frequencies: int = 5
    channel_norm: Literal["layer", "identity"] = "layer"
    backbone: str = ""
    trained_on: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    oversampling: ClassVar[int] = 1  # the image is looked at at output size

    def __post_init__(self) -> None:
        for name, choices in (("position_code", ("sine", "learnable")), ("channel_norm", ("layer", "identity"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"LoftUpConfig.{name} must be one of {choices}, got {getattr(self, name)!r}")
        _check_counts(self, "channels", "lr_size", "heads", "blocks", "image_frequencies", "feature_frequencies")
        _check_backbone(self)
        if self.trained_on is not None and not isinstance(self.trained_on, Mapping):
            raise ValueError(f"LoftUpConfig.trained_on must be a mapping or None, got {self.trained_on!r}")
        if self.width % self.heads:
            fitting = [n for n in range(1, 17) if self.width % n == 0]
            raise ValueError(
                f"{self.channels} channels make a width of {self.width}, which {self.heads} heads do not divide; "
                f"heads that do: {fitting}"
            )

    @property
    def width(self) -> int:
        """D, the width of queries and tokens."""
        return self.channels + (4 * self.feature_frequencies if self.position_code == "sine" else 0)

    def __str__(self) -> str:
        return f"channels={self.channels}, width={self.width}, backbone={self.backbone!r}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoftUpConfig":
        """Read :meth:`to_dict`'s output or the published ``{dim, lr_pe_type, lr_size}``; unknown keys are refused."""
        published = {"dim": "channels", "lr_pe_type": "position_code"}
        fields = {published.get(key, key): value for key, value in values.items()}
        _check_keys(cls, fields)
        if "channels" not in fields:
            raise ValueError(f"a LoftUp config needs 'channels' (or the published 'dim'), got {sorted(values)}")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class UniversalConfig:
    """Architecture of the network behind ``"any"``, which takes features of any backbone.

    Args:
        heads: attention heads.
        radius: of the window of cells that a pixel looks at, (2 * radius + 1)**2 cells; at most 64.
        code_width: width of a head's guidance code.
        encoder_width: width of the network that makes these codes, at least 2.
        quarter_width: width of this network's part at a quarter of the resolution, which sees farther; 0 for none.
        local: whether a cell's likeness to the cells around it says how far and how surely its pixels look.
        oversampling: greatest number of guidance pixels, along a side, whose codes an output pixel averages where the
            image is larger than the output; 1 looks at the image at output size.
        backbone: name of a backbone that the weights were trained for alone, for messages; empty for all.

    Raises:
        ValueError: a value is out of range.
    """

    heads: int = 4
    radius: int = 2
    code_width: int = 8
    encoder_width: int = 32
    quarter_width: int = 0
    local: bool = False
    oversampling: int = 1
    backbone: str = ""

    channels: ClassVar[None] = None  # any number

    def __post_init__(self) -> None:
        _check_counts(self, "heads", "radius", "code_width", "encoder_width", "oversampling")
        _check_backbone(self)
        if self.radius > 64:
            raise ValueError(f"UniversalConfig.radius must be at most 64, got {self.radius}")
        if isinstance(self.quarter_width, bool) or not isinstance(self.quarter_width, int) or self.quarter_width < 0:
            raise ValueError(
                f"UniversalConfig.quarter_width must be 0 or a positive integer, got {self.quarter_width!r}"
            )
        if not isinstance(self.local, bool):
            raise ValueError(f"UniversalConfig.local must be true or false, got {self.local!r}")
        if self.encoder_width < 2:
            raise ValueError(f"UniversalConfig.encoder_width must be at least 2, got {self.encoder_width}")

    def __str__(self) -> str:
        return f"channels=any, heads={self.heads}, backbone={self.backbone!r}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what tells them from a :class:`LoftUpConfig`'s in config.json."""
        return {"values": "features", **dataclasses.asdict(self)}


Config = LoftUpConfig | UniversalConfig


def read_config(values: Mapping[str, Any]) -> Config:
    """Read either config's ``to_dict``; ``"values": "features"`` tells the universal one.

    Raises:
        ValueError: an unknown key, or a value out of range.
    """
    kind = values.get("values", "projected")
    if kind not in ("projected", "features"):
        raise ValueError(f"'values' must be 'projected' or 'features', got {kind!r}")
    fields = {key: value for key, value in values.items() if key != "values"}
    if kind == "projected":
        return LoftUpConfig.from_dict(fields)
    _check_keys(UniversalConfig, fields)
    return UniversalConfig(**fields)


def _check_counts(config: Config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")


def _check_backbone(config: Config) -> None:
    if not isinstance(config.backbone, str):
        raise ValueError(f"{type(config).__name__}.backbone must be a string, got {config.backbone!r}")


def _check_keys(cls: type, fields: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown keys {unknown} in a LoftUp config; known keys: {sorted(known)}")
