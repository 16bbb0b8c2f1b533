"""Values that a training config may have."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from ...errors import LoftUpError
from .several import backbone_sections

if TYPE_CHECKING:
    from .schema import TrainConfig

__all__ = ["check", "converted"]

ARCHITECTURES = ("loftup", "featup_jbu", "lift", "resize_conv", "liif")
DISTANCES = ("affinity", "l2", "cosine")
KINDS = ("auto", "sa1b", "shards", "labels", "images")


def converted(value: Any, kind: Any) -> Any:
    """A value of YAML as a field's type has it where nothing is lost: 1e3 as 1000, and a text as a list of one."""
    if kind == list[str] and isinstance(value, str) and not value.startswith("${"):
        return [value]
    if kind == list[int] and isinstance(value, list):
        return [converted(item, int) for item in value]
    whole = kind is int or int in get_args(kind)
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def check(config: "TrainConfig") -> None:
    """Raise LoftUpError for a value, or a pair of values, with which no run can start."""
    model, data, objective, optimizer = config.model, config.data, config.objective, config.optimizer
    validation, distillation, views = config.validation, objective.self_distillation, objective.multi_view

    _choice("model.architecture", model.architecture, ARCHITECTURES)
    _choice("model.values", model.values, ("projected", "features"))
    _choice("model.start", model.start, ("interpolator", "random"))
    _choice("model.position_code", model.position_code, ("sine", "learnable"))
    _choice("model.batch_norm", model.batch_norm, ("frozen", "batch"))
    _choice("data.kind", data.kind, KINDS)
    _choice("validation.kind", validation.kind, KINDS)
    _choice("precision", config.precision, ("float32", "bfloat16"))
    _choice("optimizer.schedule", optimizer.schedule, ("cosine", "constant"))
    _choice("objective.self_distillation.distance", distillation.distance, DISTANCES)
    _choice("objective.high_resolution.distance", objective.high_resolution.distance, DISTANCES)

    for key, count in {
        "steps": config.steps,
        "batch": config.batch,
        "accumulate": config.accumulate,
        "save_every": config.save_every,
        "keep": config.keep,
        "log_every": config.log_every,
        "model.heads": model.heads,
        "model.blocks": model.blocks,
        "model.lr_size": model.lr_size,
        "model.radius": model.radius,
        "model.code_width": model.code_width,
        "objective.mask_bicubic.masks": objective.mask_bicubic.masks,
        "objective.segments.masks": objective.segments.masks,
        "objective.self_distillation.masks": distillation.masks,
        "objective.self_distillation.crops": distillation.crops,
        "objective.self_distillation.every": distillation.every,
        "objective.multi_view.views": views.views,
        "validation.images": validation.images,
        "validation.size": validation.size,
        "validation.every": validation.every,
        "validation.pictures": validation.pictures,
    }.items():
        _range(key, count, 0 if key == "validation.pictures" else 1)
    _range("model.encoder_width", model.encoder_width, 2)
    if not 0 <= model.channel_dropout < 1:
        _refuse("model.channel_dropout", model.channel_dropout, "a number in [0, 1)")
    for key, number in {
        "data.views": data.views,
        "data.workers": data.workers,
        "optimizer.warmup": optimizer.warmup,
        "optimizer.weight_decay": optimizer.weight_decay,
        "validation.probe_classes": validation.probe_classes,
        "objective.mask_bicubic.weight": objective.mask_bicubic.weight,
        "objective.self_distillation.weight": distillation.weight,
        "objective.high_resolution.weight": objective.high_resolution.weight,
        "objective.segments.weight": objective.segments.weight,
        "objective.multi_view.weight": views.weight,
        "objective.total_variation.weight": objective.total_variation.weight,
    }.items():
        _range(key, number, 0)
    for key, share in {
        "data.flip": data.flip,
        "optimizer.final": optimizer.final,
        "objective.mask_bicubic.alpha": objective.mask_bicubic.alpha,
        "objective.self_distillation.alpha": distillation.alpha,
        "objective.self_distillation.decay": distillation.decay,
        "objective.multi_view.flip": views.flip,
        "objective.multi_view.shift": views.shift,
    }.items():
        _range(key, share, 0, 1)
    _above("optimizer.rate", optimizer.rate, 0)
    if optimizer.clip is not None:
        _above("optimizer.clip", optimizer.clip, 0)
    if config.window is not None:
        _range("window", config.window, 1)
    if not 0 <= distillation.border < 0.5:
        _refuse("objective.self_distillation.border", distillation.border, "a number in [0, 0.5)")
    _range("objective.multi_view.zoom", views.zoom, 1)
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        _refuse("optimizer.betas", optimizer.betas, "two numbers in [0, 1)")
    for key, values, least in (
        ("data.sizes", data.sizes, 1),
        ("objective.high_resolution.factors", objective.high_resolution.factors, 1),
    ):
        if not values or min(values) < least:
            _refuse(key, values, f"one or more whole numbers of at least {least}")
    for key, numbers in (("data.ratios", data.ratios), ("data.felzenszwalb", data.felzenszwalb)):
        if not numbers or min(numbers) <= 0:
            _refuse(key, numbers, "one or more numbers above 0")
    _interval("data.scale", data.scale, 0, 1)
    _interval("objective.self_distillation.zoom", distillation.zoom, 1, float("inf"))
    for section, backbone in backbone_sections(config):
        for key, triple in ((f"{section}.mean", backbone.mean), (f"{section}.std", backbone.std)):
            if triple is not None and len(triple) != 3:
                _refuse(key, triple, "three numbers")
    _together(config)


def _together(config: "TrainConfig") -> None:
    model, data, objective = config.model, config.data, config.objective
    if not data.path:
        raise LoftUpError("data.path is empty, expected folders or shards of pictures: data.path=[FOLDER]")
    weights = {name: getattr(objective, name).weight for name in vars(objective)}
    if not any(weights.values()):
        raise LoftUpError(
            "all weights of the objective are 0; expected one above 0, such as objective.mask_bicubic.weight=1; the "
            f"terms are {', '.join(weights)}"
        )
    _check_backbones(config)
    if model.architecture != "loftup":
        if model.pretrained is not None:
            raise LoftUpError(
                f"model.pretrained={model.pretrained} with model.architecture={model.architecture}: only LoftUp goes "
                "on from weights; set model.pretrained=null"
            )
        if config.compile:
            raise LoftUpError(f"compile=true knows LoftUp alone, not {model.architecture}; set compile=false")
        if model.values != "projected":
            raise LoftUpError(
                f"model.values={model.values} with model.architecture={model.architecture}: only LoftUp has it; set "
                "model.values=projected"
            )
    elif model.values == "projected" and model.batch_norm == "batch" and config.window is not None:
        raise LoftUpError(
            f"model.batch_norm=batch with window={config.window}: the statistics of a window hold the mean of its "
            "position code, so that the norm would take from every pixel where it is. Set model.batch_norm=frozen, or "
            "window=null to see whole pictures"
        )
    fresh = model.pretrained is None and model.values == "projected"
    if fresh and model.start == "interpolator" and model.position_code != "sine":
        raise LoftUpError("model.start=interpolator needs model.position_code=sine; set that, or model.start=random")
    if data.cache is not None and not data.views:
        raise LoftUpError(
            "data.cache needs fixed crops, whose features come again: set data.views=8 or so, or no cache"
        )
    if config.validation.probe is not None and config.validation.probe_classes < 2:
        _refuse("validation.probe_classes", config.validation.probe_classes, "the number of classes of the probe")


def _check_backbones(config: "TrainConfig") -> None:
    model, count = config.model, len(config.backbones)
    if count and config.backbone != type(config.backbone)():
        raise LoftUpError(
            f"both backbone ({config.backbone.name}) and backbones "
            f"({', '.join(each.name for each in config.backbones)}) are given; put all into backbones, or set "
            "backbones=[] to train for the single one"
        )
    if count > 1 and model.values == "projected":
        raise LoftUpError(
            f"{count} backbones with model.values=projected, a network for one number of channels; set "
            "model.values=features, or give a single backbone"
        )
    if config.objective.segments.weight and model.values == "projected":
        raise LoftUpError(
            f"objective.segments.weight={config.objective.segments.weight:g} with model.values=projected, whose "
            "attention does not average what it is given; set model.values=features, or objective.segments.weight=0"
        )
    if model.channel_dropout and model.values == "projected":
        raise LoftUpError(
            f"model.channel_dropout={model.channel_dropout:g} with model.values=projected, a network for one number of "
            "channels; set model.values=features, or model.channel_dropout=0"
        )


def _choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        _refuse(key, value, f"one of {', '.join(choices)}")


def _range(key: str, value: float, least: float, most: float = float("inf")) -> None:
    if not least <= value <= most:
        _refuse(key, value, f"at least {least}" if most == float("inf") else f"a number in [{least}, {most}]")


def _above(key: str, value: float, bound: float) -> None:
    if not bound < value < float("inf"):
        _refuse(key, value, f"a finite number above {bound}")


def _interval(key: str, value: Sequence[float], low: float, high: float) -> None:
    if len(value) != 2 or not (low <= value[0] <= value[1] <= high) or value[1] <= 0 or value[0] <= 0:
        limits = f"between {low} and {high}" if high < float("inf") else f"of at least {low}"
        _refuse(key, value, f"two numbers [least, greatest] above 0 {limits}")


def _refuse(key: str, value: Any, expected: str) -> None:
    raise LoftUpError(f"{key} is {value!r}, expected {expected}; set it as {key}=... or in the YAML file")
