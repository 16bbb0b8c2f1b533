"""What a training run is: dataclasses, read from YAML and the command line."""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from ...errors import LoftUpError
from .check import check, converted

__all__ = [
    "BackboneConfig",
    "DataConfig",
    "HighResolutionConfig",
    "MaskBicubicConfig",
    "ModelConfig",
    "MultiViewConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SegmentsConfig",
    "SelfDistillationConfig",
    "TotalVariationConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "ready_configs",
    "to_yaml",
]


@dataclass
class BackboneConfig:
    """The frozen backbone, as :func:`loftup.load_backbone` takes it."""

    name: str = "dinov2_vits14"
    weights: str | None = None
    layer: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """The upsampler and its first weights.

    Args:
        architecture: "loftup", or one that it is compared with: "featup_jbu", "lift", "resize_conv" or "liif" (see
            :mod:`loftup.eval.upsamplers`), for which all below is without effect: they start near interpolation.
        values: "projected", the published network, for one backbone; or "features", the universal one (see
            :mod:`loftup.networks.universal`), for which ``start``, ``position_code``, ``lr_size``, ``blocks`` and
            ``batch_norm`` are without effect: it starts as joint bilateral upsampling and has no such parts.
        pretrained: weights to go on from, as :meth:`loftup.LoftUp.from_pretrained` takes them; None starts anew.
        start: "interpolator" (:mod:`loftup.train.objective.start`) or "random"; without ``pretrained``.
        position_code: "sine" or "learnable"; with ``pretrained`` that of the weights.
        lr_size: side of the learnable table.
        heads: attention heads.
        blocks: cross-attention blocks.
        batch_norm: "frozen" (running statistics, calibrated on whole images before a random start) or "batch".
        radius: with values="features", cells that a pixel sees on each side of its own.
        code_width: with values="features", channels of each head's guidance code.
        encoder_width: with values="features", channels inside the network that makes these codes.
        channel_dropout: with values="features", greatest share of the features' channels left out in a step, which
            makes backbones with fewer channels of one; at least 8 stay.
    """

    architecture: str = "loftup"
    values: str = "projected"
    pretrained: str | None = None
    start: str = "random"
    position_code: str = "sine"
    lr_size: int = 16
    heads: int = 4
    blocks: int = 2
    batch_norm: str = "batch"
    radius: int = 2
    code_width: int = 8
    encoder_width: int = 32
    channel_dropout: float = 0.0


@dataclass
class DataConfig:
    """Pictures, masks and the views made of them.

    Args:
        path: folders or shards, one or several.
        kind: "auto", "sa1b", "shards", "labels" or "images" (masks by Felzenszwalb on the fly).
        felzenszwalb: scales of the masks made on the fly.
        sizes: sides S of the backbone's square input in pixels, one drawn for every step.
        ratios: output size over input size, one drawn for every step.
        scale: smallest and largest side of the random square crop, as a share of the picture's short side.
        flip: probability of mirroring.
        views: 0 draws a new crop every time; K > 0 uses K fixed crops of every picture, whose features can be cached.
        cache: folder for features on disk; needs ``views``. It saves the backbone's pass over the student's images
            alone, not over crops and enlarged images, and holds ``views`` entries of a picture for each of ``sizes``.
        workers: loader processes.
    """

    path: list[str] = field(default_factory=list)
    kind: str = "auto"
    felzenszwalb: list[float] = field(default_factory=lambda: [300.0, 600.0, 1200.0])
    sizes: list[int] = field(default_factory=lambda: [224])
    ratios: list[float] = field(default_factory=lambda: [1.0])
    scale: list[float] = field(default_factory=lambda: [0.6, 1.0])
    flip: float = 0.5
    views: int = 0
    cache: str | None = None
    workers: int = 2


@dataclass
class MaskBicubicConfig:
    """Stage 1 (Eq. 1 and 2): squared distance to bicubic features refined by masks."""

    weight: float = 0.0
    alpha: float = 0.8
    masks: int = 150


@dataclass
class SelfDistillationConfig:
    """Stage 2 (Eq. 3): a teacher, the moving average of the student, sees crops of the enlarged image.

    Args:
        weight: of the term.
        distance: "affinity", "l2" or "cosine".
        crops: of every image.
        zoom: least and greatest t.
        refine: refine the teacher's output by masks.
        alpha: of that.
        masks: at most so many.
        border: share of the crop cut off at each side.
        decay: of the moving average.
        every: steps between its updates.
    """

    weight: float = 0.0
    distance: str = "affinity"
    crops: int = 2
    zoom: list[float] = field(default_factory=lambda: [2.0, 4.0])
    refine: bool = True
    alpha: float = 0.8
    masks: int = 150
    border: float = 0.1
    decay: float = 0.99
    every: int = 10


@dataclass
class HighResolutionConfig:
    """The backbone's features of the image enlarged k times, as target on their own grid (LiFT: k = 2).

    Args:
        weight: of the term.
        distance: "l2", "cosine" or "affinity".
        factors: values of k, one drawn for every step.
        crop: enlarge the window's surroundings alone, at the backbone's input size, rather than the whole image.
    """

    weight: float = 0.0
    distance: str = "l2"
    factors: list[int] = field(default_factory=lambda: [2, 3, 4])
    crop: bool = False


@dataclass
class SegmentsConfig:
    """A probe of every picture's masks, read at low resolution and judged on the output's pixels.

    Args:
        weight: of the term; for ``model.values=features`` alone.
        ridge: of the probe, as a share of the mean squared length of a cell's features.
        masks: at most so many of a picture, drawn at random.
    """

    weight: float = 0.0
    ridge: float = 0.3
    masks: int = 32


@dataclass
class MultiViewConfig:
    """FeatUp's consistency: downsampled dense features of a moved view equal the backbone's features of that view.

    Args:
        weight: of the term.
        views: random affine views a step.
        zoom: greatest magnification.
        shift: greatest shift, as a share of the side.
        flip: probability of mirroring.
    """

    weight: float = 0.0
    views: int = 2
    zoom: float = 1.6
    shift: float = 0.2
    flip: float = 0.5


@dataclass
class TotalVariationConfig:
    """Mean absolute difference of neighbouring output pixels."""

    weight: float = 0.0


@dataclass
class ObjectiveConfig:
    """Weighted sum of the terms whose weight is not 0."""

    mask_bicubic: MaskBicubicConfig = field(default_factory=MaskBicubicConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    high_resolution: HighResolutionConfig = field(default_factory=HighResolutionConfig)
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)
    multi_view: MultiViewConfig = field(default_factory=MultiViewConfig)
    total_variation: TotalVariationConfig = field(default_factory=TotalVariationConfig)


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        rate: highest learning rate.
        schedule: "cosine" or "constant", after the warm-up.
        warmup: steps of linear warm-up.
        final: last rate of the cosine as a share of the highest.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: greatest norm of the gradient; None leaves it.
    """

    rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.02
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip: float | None = 1.0


@dataclass
class ValidationConfig:
    """What is measured and drawn on validation pictures.

    checkpoints/best.pt is the student of the lowest loss of stage 1 on them; where there is a probe, of its highest
    mIoU.

    Args:
        path: folder or shards; None validates nothing.
        kind: as for the training data.
        images: at most so many, evenly spread.
        size: side of the centre crop in pixels.
        every: steps between validations.
        pictures: pictures in the PCA grid.
        probe: folder of NAME.jpg and NAME.png label maps to train a quick linear probe on and judge by; None for none.
        probe_classes: labels 0 .. n-1 count, others do not.
    """

    path: list[str] = field(default_factory=list)
    kind: str = "auto"
    images: int = 50
    size: int = 224
    every: int = 500
    pictures: int = 4
    probe: str | None = None
    probe_classes: int = 0


@dataclass
class TrainConfig:
    """A training run.

    Args:
        backbones: several backbones in place of the single ``backbone``, for ``model.values="features"``; one is drawn
            for every step. The probe of the validation takes the first.
        output: folder of the run: checkpoints, logs, pictures, and at the end the weights.
        steps: optimizer steps.
        batch: images a step in each process and micro-batch.
        accumulate: micro-batches a step.
        window: side of the random window of output pixels that the loss sees, rounded to feature cells; None for all.
            It is for the terms on the whole output: self-distillation computes its crops alone, whatever the window.
        precision: "float32" or "bfloat16" (autocast).
        compile: torch.compile the network; with ``model.values="features"`` the part that looks at images.
        checkpointing: compute activations twice to save memory; without effect with ``model.values="features"``.
        seed: of everything random.
        save_every: steps between checkpoints.
        keep: checkpoints kept, beside the best.
        log_every: steps between lines of the log.
        hub: repository to push the weights to at the end; None for none.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    backbones: list[BackboneConfig] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: str = "runs/loftup"
    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    window: int | None = None
    precision: str = "float32"
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    hub: str | None = None


def ready_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(Path(file.name).stem for file in _folder().iterdir() if file.name.endswith(".yaml"))


def load_config(source: "str | os.PathLike[str]", overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's config from YAML; what the file leaves out has the defaults of :class:`TrainConfig`.

    Args:
        source: a YAML file, or one of :func:`ready_configs`.
        overrides: ``"optimizer.rate=1e-3"`` and so on, which win over the file. Values are YAML; lists are written
            ``"data.path=[photos,more]"``; one of several backbones is changed by ``"backbones[0].layer=3"``.

    Returns:
        The config, checked by :func:`loftup.train.config.check`.

    Raises:
        LoftUpError: there is no such file, it is not YAML, a key is unknown, a value is of the wrong type or out of
            range, or omegaconf is missing (extra ``train``).
    """
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise LoftUpError('training configs need omegaconf: pip install "loftup[train]"') from error
    file = _find(source)
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise LoftUpError(f"override {override!r}, expected key=value, such as optimizer.rate=1e-3")
    config, merged = TrainConfig(), OmegaConf.structured(TrainConfig)
    for read, where in (
        (lambda: OmegaConf.create(file.read_text("utf-8")), str(source)),
        (lambda: OmegaConf.from_dotlist(list(overrides)), "the command line"),
    ):
        try:
            given = _whole_lists(OmegaConf.to_container(read()), config, where)
            _check_keys(given, where)
            merged = OmegaConf.merge(merged, given)
            config = OmegaConf.to_object(merged)  # type: ignore[assignment]
        except LoftUpError:
            raise
        except Exception as error:  # omegaconf, its YAML reader and its checks of types each raise their own
            raise LoftUpError(f"cannot use the config in {where}: {_reason(error)}") from error
    check(config)
    return config


def to_yaml(config: TrainConfig) -> str:
    """The whole config as YAML that :func:`load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _folder() -> Any:
    return files("loftup.train.config") / "ready"


def _find(source: "str | os.PathLike[str]") -> Any:
    if Path(source).expanduser().is_file():
        return Path(source).expanduser()
    ready = ready_configs()
    if str(source) in ready:
        return _folder() / f"{source}.yaml"
    near = difflib.get_close_matches(str(source), ready, n=2)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise LoftUpError(f"no config {str(source)!r}: there is no such file; {meant}Ready configs: {', '.join(ready)}")


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(kind):
        yield prefix + entry.name
        if dataclasses.is_dataclass(entry.type):
            yield from _keys(entry.type, f"{prefix}{entry.name}.")  # type: ignore[arg-type]


def _check_keys(given: Any, where: str, kind: type = TrainConfig, prefix: str = "") -> None:
    """Raise LoftUpError for a key that no dataclass has, naming near ones; convert values in place."""
    if not isinstance(given, dict):
        at = f"{prefix[:-1]!r} in {where}" if prefix else where
        raise LoftUpError(f"{at} holds {given!r}, expected keys and values such as {dataclasses.fields(kind)[0].name}")
    known = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    for key, value in given.items():
        if key not in known:
            names = {path: path.rpartition(".")[2] for path in _keys(TrainConfig)}
            alike = difflib.get_close_matches(str(key), sorted(set(names.values())), n=2)
            near = [path for match in alike for path, name in names.items() if name == match]
            meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            section = f"{prefix[:-1]!r}" if prefix else "the top level"
            raise LoftUpError(f"unknown key '{prefix}{key}' in {where}; {meant}Keys of {section}: {', '.join(known)}")
        given[key] = converted(value, known[key])
        if dataclasses.is_dataclass(known[key]):
            _check_keys(value, where, known[key], f"{prefix}{key}.")  # type: ignore[arg-type]
        elif (items := get_args(known[key])) and dataclasses.is_dataclass(items[0]):
            if not isinstance(value, list):
                raise LoftUpError(
                    f"'{prefix}{key}' in {where} holds {value!r}, expected a list such as "
                    f"[{{{dataclasses.fields(items[0])[0].name}: ...}}]"
                )
            for index, item in enumerate(value):
                _check_keys(item, where, items[0], f"{prefix}{key}[{index}].")  # type: ignore[arg-type]


def _whole_lists(given: Any, config: TrainConfig, where: str) -> Any:
    """``backbones[1].layer=3``, which OmegaConf reads as a dict by numbers, as the config's list, changed there."""
    from omegaconf import OmegaConf

    parts = given.get("backbones") if isinstance(given, dict) else None
    if not isinstance(parts, dict) or not all(str(index).isdecimal() for index in parts):
        return given
    whole: list[Any] = dataclasses.asdict(config)["backbones"]
    for index, part in parts.items():
        if int(index) >= len(whole):
            raise LoftUpError(
                f"{where} changes backbones[{index}], but there are {len(whole)}, counted from 0; give the whole list: "
                "backbones=[{name: ...}, ...]"
            )
        if isinstance(part, dict):
            part = OmegaConf.to_container(OmegaConf.merge(whole[int(index)], part))
        whole[int(index)] = part
    return {**given, "backbones": whole}


def _reason(error: Exception) -> str:
    text = str(error).partition("\n    reference_type")[0].partition("\n    object_type")[0]
    hint = "; a list is written [a, b]" if "ListConfig" in text else ""
    return " ".join(text.replace("full_key:", "at the key").split()) + hint
