"""All that decides the content of an output folder."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import suggest

__all__ = ["KINDS", "NEED_UPSAMPLER", "SCHEMA", "Settings"]

SCHEMA = 1  # version of the layout that docs/scale.md describes
KINDS = ("features", "pooled", "points", "logits", "labels", "regions", "dense")
NEED_UPSAMPLER = {"points", "logits", "labels", "regions", "dense"}
CHOICES = {
    "store": ("float16", "uint8"),
    "format": ("parquet", "webdataset"),
    "dtype": ("float32", "bfloat16", "float16"),
    "views": (1, 4, 9, 16),
}


@dataclass(frozen=True)
class Settings:
    """Choices of an extraction: outputs of every picture, the networks that make them, and how they are stored.

    Args:
        backbone: a name that :func:`loftup.load_backbone` takes.
        backbone_weights: local file of the backbone's weights; None takes those of its name.
        layer: stage or block of the backbone; None means its last.
        options: passed to the backbone's library.
        mean: image mean of the backbone, three numbers; None means its own.
        std: image deviation of the backbone, three numbers above 0; None means its own.
        views: shifted views of each picture: 1, 4, 9 or 16.
        weights: of the upsampler, as :meth:`loftup.LoftUp.from_pretrained` takes it; None means the backbone's name.
        strict: refuse a backbone without upsampler weights of its own; else it gets "any".
        input: short side in pixels of the picture that the backbone sees; it is never enlarged by this.
        size: (H, W) of upsampled outputs in pixels; None means the picture's, at most 512 long.
        save: some of "features" (C, h, w) as the backbone gives them, "pooled" (C) their mean, "points" (N, C) at a
            grid of points, "logits" (K, H, W) of ``head``, "labels" (H, W) its largest logit, "regions" (N, C) means in
            the masks of ``masks``, "dense" (C, H, W) upsampled features.
        points: (rows, columns) of a grid of points, at the centres of equal rectangles.
        head: file in safetensors with ``weight`` (K, C), or (K, C, 1, 1), and perhaps ``bias`` (K).
        masks: folder of label maps, PNG files below it that are named as the pictures' keys, with ``.png`` for suffix.
        images: store the picture too, as JPEG of the size of the upsampled outputs, so that the output stands alone.
        store: dtype of the arrays: "float16", or "uint8" with a step and an offset for every channel.
        dtype: of the upsampler.
        batch: pictures of one size that are computed at once.
        part: pictures of a shard; None means 256, fewer where a shard would exceed 256 MB.
        format: of the shards, "parquet" or "webdataset".

    Raises:
        ValueError: a value is none of its choices, or one that others need is missing.
    """

    backbone: str = "dinov2_vits14"
    backbone_weights: str | None = None
    layer: int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    views: int = 1
    weights: str | None = None
    strict: bool = False
    input: int = 224
    size: tuple[int, int] | None = None
    save: tuple[str, ...] = ("features",)
    points: tuple[int, int] | None = None
    head: str | None = None
    masks: str | None = None
    images: bool = False
    store: str = "float16"
    dtype: str = "float32"
    batch: int = 8
    part: int | None = None
    format: str = "parquet"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        for kind in self.save:
            if kind not in KINDS:
                hint = suggest(kind, KINDS) if isinstance(kind, str) else ""
                raise ValueError(f"save must be some of {', '.join(KINDS)}, got {kind!r}; {hint}".rstrip("; "))
        if not self.save or len(set(self.save)) < len(self.save):
            raise ValueError(f"save must name one output or more, each once, got {self.save!r}")
        for needs, kinds in (("points", {"points"}), ("head", {"logits", "labels"}), ("masks", {"regions"})):
            wanted = kinds & set(self.save)
            if wanted and getattr(self, needs) is None:
                raise ValueError(f"save={min(wanted)!r} needs {needs}, got None")
            if not wanted and getattr(self, needs) is not None:
                raise ValueError(f"{needs} is given, but save has none of {', '.join(sorted(kinds))}; got {self.save}")
        for name in ("input", "batch", "part"):
            value = getattr(self, name)
            if name == "part" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name in ("size", "points"):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair)):
                raise ValueError(f"{name} must be two positive whole numbers, got {pair!r}")

    @property
    def upsamples(self) -> bool:
        """Tell whether an output needs the upsampler."""
        return bool(NEED_UPSAMPLER & set(self.save))

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON has them, for manifests and for comparing."""
        values = dataclasses.asdict(self) | {"schema": SCHEMA}
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that a manifest holds."""
        known = {each.name for each in dataclasses.fields(cls)}
        pairs = {name: value for name, value in values.items() if name in known}
        restored: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in pairs.items()
        }
        return cls(**restored)
