"""Building a timm model by name, with weights from the Hub, from the package, from a local file, or none."""

import contextlib
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import LoftUpError, one_line, suggest
from ..weights.aliases import TIMM_NAMES, is_open_clip
from ..weights.catalogue import ANY, PUBLISHED, TINY_BACKBONES, Checkpoint, find_checkpoint, known_names
from ..weights.hub import cache_alone_if_unreachable
from .libraries import build_open_clip, build_transformers, is_transformers
from .maps import FLEXIBLE, timm_config
from .tiny import Stages

__all__ = ["build_named", "find", "size_options"]

WeightsSource = str | os.PathLike[str] | Literal[False] | None


def find(name: str) -> tuple[str, str, Checkpoint | None]:
    """The library that has a backbone, its name there, and the published checkpoint whose scaling applies.

    The library is timm where it has the backbone, under whatever name; else open_clip or transformers. A name is never
    guessed: LoftUpError names the near misses. TypeError: not a string.
    """
    import timm

    if not isinstance(name, str):
        hint = "; for a model object: wrap(model)" if isinstance(name, nn.Module) else ""
        raise TypeError(f"load_backbone takes the name of a backbone, got {type(name).__name__}{hint}")
    if name in PUBLISHED:
        return "timm", str(PUBLISHED[name].timm), PUBLISHED[name]
    if name.startswith(("hf-hub:", "hf_hub:")):
        return "timm", name, None  # timm reads the model's kind from the repository
    pretrained = timm.list_pretrained()
    if name in pretrained or name in timm.list_models():
        return "timm", name, None
    if (checkpoint := find_checkpoint(name)) and checkpoint.timm:
        return "timm", checkpoint.timm, checkpoint
    if (bare := name.removeprefix("timm/")) in pretrained:
        return "timm", bare, None
    if name in TIMM_NAMES:
        return "timm", TIMM_NAMES[name], None
    if is_open_clip(name):
        return "open_clip", name, None
    if is_transformers(name):
        return "transformers", name, None
    names = [known for known in dict.fromkeys((*known_names(), *TIMM_NAMES)) if known != ANY]  # an upsampler
    meant = suggest(name, [*names, *pretrained, *timm.list_models()], cutoff=0.5)
    raise LoftUpError(
        f"unknown backbone {name!r}; {meant}Known are {', '.join((*TINY_BACKBONES, *PUBLISHED))}, the names in "
        "timm.list_models() and timm.list_pretrained(), 'org/name' of a transformers model, and 'ViT-B-16/tag' of "
        "open_clip"
    )


def build_named(
    name: str, weights: WeightsSource, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Sequence[float] | None, Sequence[float] | None], str]:
    """The model of a name, mean and std of its images (None for the model's own), and its name ("" for its own)."""
    if name in TINY_BACKBONES:
        return *build_tiny(name, weights, options), name
    library, known, checkpoint = find(name)
    if library == "open_clip":
        return build_open_clip(name, weights, options), (None, None), name
    if library == "transformers":
        return *build_transformers(name, weights, options), name
    model = build(known, weights, options)
    if checkpoint is None:
        return model, (None, None), ""
    return model, (checkpoint.mean, checkpoint.std), checkpoint.name


def build_tiny(name: str, weights: WeightsSource, options: dict[str, Any]) -> tuple[nn.Module, tuple[Any, Any]]:
    """A backbone that comes with the package, and mean and std of its images; otherwise as :func:`build`."""
    folder = TINY_BACKBONES[name]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    file = folder / "model.safetensors" if weights is None else weights
    settings = {**config["options"], **options}
    if trunk := config.get("trunk"):
        from timm.layers.hybrid_embed import HybridEmbed

        convolutions = build(trunk["timm"], False, trunk["options"])
        settings["embed_layer"] = functools.partial(HybridEmbed, backbone=Stages(convolutions))
    subject = f"{name!r} with the options {options}" if options else repr(name)
    return build(config["timm"], file, settings, subject), (config["mean"], config["std"])


def build(name: str, weights: WeightsSource, options: dict[str, Any], subject: str = "") -> nn.Module:
    """Build a timm model that takes images of any size where timm can make it so; see :func:`load_backbone`.

    ``subject`` is what errors call it.
    """
    for option in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):
        if option in options:
            raise LoftUpError(f"{option} is not taken: timm may run what a pickle holds. Pass weights=PATH instead")
    if weights is None or weights is False:
        overlay = {}
    elif isinstance(weights, str | os.PathLike):
        # As a state dict, not as a file: older timm reads pickles with weights_only=False.
        overlay = {"state_dict": _read_weights(Path(weights).expanduser()), "source": ""}
    else:
        raise TypeError(f"weights must be a path, None (from the Hub) or False (random), got {weights!r}")
    subject = subject or (f"{name!r} with the options {options}" if options else repr(name))
    try:
        hub = cache_alone_if_unreachable(f"timm/{name}") if weights is None else contextlib.nullcontext()
        with hub, _Copies() as copies:
            try:
                model = _create(name, options, weights is not False, overlay)
            except RuntimeError as error:
                if not overlay or "num_classes" in options or not _differs_in_classifier(name, str(error)):
                    raise
                # A backbone needs no classifier: the file may have none, or one for other classes.
                model = _create(name, {**options, "num_classes": 0}, True, overlay)
    except Exception as error:  # the Hub's client, its transport and timm each have exceptions of their own
        refusal = isinstance(error, AssertionError | NotImplementedError) or "keyword argument" in str(error)
        if refusal or weights is False:
            message = f"timm cannot build {subject}: {_shorten(error)}"
        elif overlay:
            keys = _shorten(", ".join(sorted(overlay["state_dict"], key=lambda key: key.count("."))), 200)
            message = f"{weights} does not hold weights for {subject}: {_shorten(error)}. Keys of the file: {keys}"
        else:
            message = (
                f"could not load timm's weights for {subject} from the Hub ({_shorten(error, 200)}). Without the Hub, "
                "give a local file, load_backbone(name, weights=path) or --backbone-weights FILE, or weights=False for "
                "random ones"
            )
        raise LoftUpError(message) from (error if refusal else None)
    # timm keeps the configuration, and with it a second copy of all weights.
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)
    # Where the number of classes differs, timm loads loosely and leaves random what it does not find.
    if overlay and (missing := [key for key in copies.others(model) if not key.startswith(_classifiers(name))]):
        raise LoftUpError(f"{weights} does not hold weights for {name!r}: missing {_shorten(', '.join(missing))}")
    return model


def size_options(model: Any) -> str:
    """The options, as text, by which timm builds a model for other sizes; "" where it has none."""
    if not timm_config(model)[2]:
        return ""
    classes = [type(m) for m in (model, getattr(model, "model", None)) if m is not None]
    known = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    options = [f"{key}={value}" for choice in FLEXIBLE for key, value in choice.items() if key in known]
    return options[0] if options else "img_size=(H, W)" if "img_size" in known else ""


def _create(name: str, options: dict[str, Any], pretrained: bool, overlay: dict[str, Any]) -> nn.Module:
    import timm

    for flexible in FLEXIBLE:
        settings = {"pretrained_cfg_overlay": overlay or None, **flexible, **options}
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
            return model
        except TypeError as error:
            # Most models know neither option; what the user asked for has to be known.
            if "unexpected keyword argument" not in str(error) or not set(flexible) - set(options):
                raise
    raise AssertionError("the last choice has no options of its own")


def _read_weights(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    if not path.is_file():
        raise LoftUpError(f"no such weights file: {path}")
    try:
        state: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each raise their own
        message = f"cannot read {path}: {_shorten(error)}. Expected safetensors, or a pickle of tensors only"
        if "TorchScript" in str(error):
            message += (
                "; if it is a TorchScript archive, as OpenAI's CLIP files are, save its weights alone: "
                "torch.save(torch.jit.load(path, 'cpu').state_dict(), 'weights.pt')"
            )
        raise LoftUpError(message) from error
    if not isinstance(state, dict) or not state:
        raise LoftUpError(f"{path} holds a {type(state).__name__}, expected a non-empty dict of tensors")
    return state


class _Copies(TorchFunctionMode):
    """Notes which tensors are copied into, in this thread alone: those that ``load_state_dict`` finds in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}  # by id; held, so that no id comes up twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_:
            self.tensors[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def others(self, model: nn.Module) -> list[str]:
        """The keys of a model that were not written."""
        unwritten = (key for key, value in model.state_dict(keep_vars=True).items() if id(value) not in self.tensors)
        return [key for key in unwritten if "num_batches_tracked" not in key]


def _differs_in_classifier(name: str, message: str) -> bool:
    """Tell whether the keys that torch's strict loading complains of are all the classifier's."""
    keys = ["".join(key) for key in re.findall(r'"([\w.]+)"|size mismatch for ([\w.]+):', message)]
    if "_clip_" in name:
        return False  # timm calls CLIP's projection a classifier, but here it is needed
    return bool(keys) and all(key.startswith(_classifiers(name)) for key in keys)


def _classifiers(name: str) -> tuple[str, ...]:
    """Beginnings of the keys of a timm model's classifiers."""
    import timm

    config = timm.get_pretrained_cfg(name)
    names = (config.classifier if config else None) or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _shorten(error: "BaseException | str", limit: int = 600) -> str:
    text = one_line(error)
    return text if len(text) <= limit else f"{text[:limit]} ..."
