"""Values, and pairs of values, with which a run can start; and messages about those with which none can."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from ...errors import LoftUpError
from .schema import AVERAGING, BackboneConfig, TrainConfig

__all__ = ["check", "checked"]

T = TypeVar("T")
ADAPTER = TypeAdapter(TrainConfig)
OWN = ("name", "weights", "layer", "mean", "std", "views")  # of loftup.load_backbone
WORDS = {  # shorter than pydantic's
    "Value error, ": "",
    "Input should be ": "",
    "String should have at least 1 character": "a text that is not empty",
    "List should have ": "a list of ",
    " after validation": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}


def check(config: TrainConfig) -> TrainConfig:
    """A copy of a config, its values in the types of their fields.

    Raises:
        LoftUpError: a value, or a pair of values, with which no run can start; the text names the key and the remedy.
    """
    return validated(dataclasses.asdict(config), lambda key: "")


def validated(values: Any, origin: Callable[[str], str]) -> TrainConfig:
    """The checked config of nested dicts; ``origin`` names the place that a key is from, for messages, if any."""
    try:
        config = ADAPTER.validate_python(values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = _key(detail["loc"])
        raise LoftUpError(_message(detail, key, origin(key))) from error
    for conflict in _conflicts(config):
        raise LoftUpError(conflict)
    return config


def checked(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """An object of a dataclass, its values of the types and within the bounds that its fields are annotated with.

    Raises:
        LoftUpError: a value is of another type or out of bounds; the text begins with ``where``.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        detail = error.errors()[0]
        if not detail["loc"]:
            raise LoftUpError(f"{where}: {_plain(detail['msg'])}") from error
        key = _key(detail["loc"])
        raise LoftUpError(f"{where}: {key} is {_shown(detail['input'])}, expected {_plain(detail['msg'])}") from error


def near(name: str, choices: Iterable[str]) -> str:
    """A question for the one or two choices, or last parts of dotted ones, that are most like a name."""
    lasts = {choice: choice.rpartition(".")[2] for choice in choices}
    alike = difflib.get_close_matches(name, sorted(set(lasts.values())), n=2)
    meant = [repr(choice) for match in alike for choice, last in lasts.items() if last == match]
    return f"did you mean {' or '.join(meant)}? " if meant else ""


def _key(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def _plain(text: str) -> str:
    for formal, plain in WORDS.items():
        text = text.replace(formal, plain)
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _message(detail: Any, key: str, where: str) -> str:
    section, _, name = key.rpartition(".")
    if detail["type"] == "unexpected_keyword_argument":
        return (
            f"unknown key {key!r} in {where}; {near(name, _keys(TrainConfig))}Keys of "
            f"{repr(section) if section else 'the top level'}: {', '.join(_fields(detail['loc'][:-1]))}"
        )
    if detail["type"] == "dataclass_type":
        example = _fields(detail["loc"])[0]
        return f"{key!r} in {where} holds {detail['input']!r}, expected keys and values such as {example}"
    expected = _plain(detail["msg"])
    if detail["type"] == "list_type":
        expected = f"a list such as {'[{name: ...}]' if key == 'backbones' else '[a, b]'}"
    place = f" in {where}" if where else ""
    return f"{key} is {_shown(detail['input'])}{place}, expected {expected}; set it as {key}=... or in the YAML file"


def _fields(path: tuple[str | int, ...]) -> list[str]:
    """The keys of a section, or of one in a list of sections."""
    kind: Any = TrainConfig
    for name in path:
        if isinstance(name, str):
            kind = kind.__annotations__[name]
            kind = (get_args(kind) or (kind,))[0]
    return [entry.name for entry in dataclasses.fields(kind)]


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(kind):
        yield prefix + entry.name
        if dataclasses.is_dataclass(entry.type):
            yield from _keys(entry.type, f"{prefix}{entry.name}.")


def _conflicts(config: TrainConfig) -> Iterator[str]:
    """Messages about settings that do not go together."""
    model, objective, validation = config.model, config.objective, config.validation
    names = [each.name for each in config.backbones]
    for name, section in config.sections.items():
        if strays := [key for key in section.options if key in OWN]:
            remedy = f"set {name}.{strays[0]}" if strays[0] in vars(section) else "leave it out"
            yield f"{name}.options holds {strays[0]!r}, no option of timm's but of loftup's own; {remedy}"
    architecture = f"model.architecture={model.architecture}"
    if not config.data.path:
        yield "data.path is empty, expected folders or shards of pictures: data.path=[FOLDER]"
    if not any(objective.weights.values()):
        yield (
            "all weights of the objective are 0; expected one above 0, such as objective.mask_bicubic.weight=1; the "
            f"terms are {', '.join(objective.weights)}"
        )
    if names and config.backbone != BackboneConfig():
        yield (
            f"both backbone ({config.backbone.name}) and backbones ({', '.join(names)}) are given; put all into "
            "backbones, or set backbones=[] to train for the single one"
        )
    if len(names) > 1 and not model.universal:
        yield (
            f"{len(names)} backbones with {architecture}, a network for one number of channels; set "
            "model.architecture=any, or give a single backbone"
        )
    for name in AVERAGING:
        if (weight := objective.weights[name]) and not model.universal:
            yield (
                f"objective.{name}.weight={weight:g} with {architecture}, whose attention does not average what it is "
                f"given; set model.architecture=any, or objective.{name}.weight=0"
            )
    if objective.classes.weight:
        paths, classes = config.data.path, config.data.classes
        if len(classes) != len(paths) or max(classes, default=0) < 2:
            yield (
                f"data.classes={classes} for {len(paths)} of data.path; objective.classes needs the number of classes "
                "in each of them, 0 where there are none: data.classes=[21, 0], or objective.classes.weight=0"
            )
    shifted = objective.shifted
    coarser = [name for name, section in config.sections.items() if section.views >= shifted.views]
    if shifted.weight and coarser:
        yield (
            f"objective.shifted.views={shifted.views} is no finer than the views of {', '.join(coarser)}; give more "
            "views to the target, fewer to the backbone, or set objective.shifted.weight=0"
        )
    imitation = objective.imitation
    if imitation.weight:
        if imitation.upsampler is None:
            yield (
                "objective.imitation.upsampler is null, expected whom to imitate; set it as "
                "objective.imitation.upsampler=anyup:WEIGHTS@FOLDER, or objective.imitation.weight=0"
            )
        if not imitation.trust_code:
            yield (
                f"objective.imitation.upsampler={imitation.upsampler} runs the code in that folder; read it, and set "
                "objective.imitation.trust_code=true"
            )
        others = set(range(len(config.sections))).difference(imitation.backbones or range(len(config.sections)))
        if others and not any(value for name, value in objective.weights.items() if name != "imitation"):
            yield (
                "objective.imitation is the only term and counts for some of the backbones alone, so that the others' "
                "steps would teach nothing; set objective.imitation.backbones=[], or give another term"
            )
        if wrong := [number for number in imitation.backbones if number >= len(config.sections)]:
            yield (
                f"objective.imitation.backbones holds {wrong[0]}, expected numbers below {len(config.sections)}, that "
                "of the backbones"
            )
    if model.oversampling > 1 and not model.universal:
        yield (
            f"model.oversampling={model.oversampling} with {architecture}, which looks at images at output size; set "
            "model.architecture=any, or model.oversampling=1"
        )
    for name, what in (("channel_dropout", "number"), ("channel_mixing", "order")):
        if (value := getattr(model, name)) and not model.universal:
            yield (
                f"model.{name}={value:g} with {architecture}, a network for one {what} of channels; set "
                f"model.architecture=any, or model.{name}=0"
            )
    if model.pretrained is not None and model.baseline:
        yield (
            f"model.pretrained={model.pretrained} with {architecture}: only LoftUp goes on from weights; set "
            "model.pretrained=null"
        )
    if config.compile and model.baseline:
        yield f"compile=true knows LoftUp alone, not {model.architecture}; set compile=false"
    if config.triton and not model.universal:
        yield f"triton=true is for model.architecture=any, not {model.architecture}; set triton=false"
    if config.window is not None and model.architecture == "loftup" and model.batch_norm == "batch":
        yield (
            f"model.batch_norm=batch with window={config.window}: the statistics of a window hold the mean of its "
            "position code, so that the norm would take from every pixel where it is. Set model.batch_norm=frozen, or "
            "window=null to see whole pictures"
        )
    fresh = model.architecture == "loftup" and model.pretrained is None
    if fresh and model.start == "interpolator" and model.position_code != "sine":
        yield "model.start=interpolator needs model.position_code=sine; set that, or model.start=random"
    if config.data.cache is not None and not config.data.views:
        yield "data.cache needs fixed crops, whose features come again: set data.views=8 or so, or no cache"
    if validation.probe is not None and validation.probe_classes < 2:
        yield (
            f"validation.probe_classes is {validation.probe_classes}, expected the number of classes of the probe; set "
            "it as validation.probe_classes=..."
        )
