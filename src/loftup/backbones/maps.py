"""Models that make feature maps themselves: timm's other families, torch.hub's DINOv2 and v3, AutoBackbone."""

import contextlib
import functools
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import LoftUpError, one_line
from .geometry import Maps
from .vit import IMAGENET, Layer, Scaling, Source, pair, part, pick_layers

__all__ = [
    "evaluating",
    "frozen",
    "hub_dino",
    "modules_of",
    "timm_features",
    "timm_stages",
    "transformers_backbone",
    "trying",
]

EMPTY = types.CellType()  # of a variable that was not set yet
# Options by which timm builds a model for any image size. Swin knows the first; older ones swallow the second unused.
FLEXIBLE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


def timm_config(model: Any) -> tuple[str, Scaling, dict[str, Any]]:
    """The full name, the scaling and the whole pretrained configuration of a timm model."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    return name, (config.get("mean", IMAGENET[0]), config.get("std", IMAGENET[1])), config


def dinov2_name(width: int, depth: int, patch_size: int, registers: int) -> str:
    """torch.hub's name of the DINOv2 with these sizes, "" if there is none."""
    letter = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1536, 40): "g"}.get((width, depth))
    if letter is None or patch_size != 14 or registers not in (0, 4):
        return ""
    return f"dinov2_vit{letter}14{'_reg' if registers else ''}"


def match_weights(image: Tensor, model: nn.Module) -> Tensor:
    """The image in the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), image.dtype)
    return image.to(dtype)


def native_size(model: Any) -> tuple[tuple[int, int] | None, bool]:
    """The (H, W) that a timm model was built for, and whether it is known to take no other."""
    _, _, config = timm_config(model)
    embed = part(model, "patch_embed") or part(model, "model.patch_embed")
    size = getattr(embed, "img_size", None) or tuple(config.get("input_size", ()))[1:]
    strict = bool(getattr(embed, "strict_img_size", False)) and not getattr(model, "dynamic_img_size", False)
    return (pair(size) if size else None), strict


@dataclass
class TimmStages:
    """Stages of any timm model by ``forward_intermediates``, stopping early.

    They are counted from the end: older timm counts a stem, which ``feature_info`` leaves out, as the first.
    """

    model: Any
    stages: tuple[int, ...]
    norm: bool

    def __call__(self, image: Tensor) -> Maps:
        image, order = match_weights(image, self.model), sorted(set(self.stages))
        options = {"indices": order, "norm": self.norm, "output_fmt": "NCHW"}
        maps = self.model.forward_intermediates(image, stop_early=True, intermediates_only=True, **options)
        return [maps[order.index(stage)] for stage in self.stages]


def timm_stages(model: Any, layer: Layer) -> Source | None:
    """CNNs, hierarchical transformers, Eva (EVA02, DINOv3) and every other timm model with ``feature_info``.

    Models whose layers all have the same stride get their final norm, as plain ViTs do; stages of the others come as
    ``features_only=True`` gives them.
    """
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list) or not info or not hasattr(model, "forward_intermediates"):
        return None
    if layer is None and not type(model).forward_features.__module__.startswith("timm."):
        return None  # a subclass's own features
    name, scaling, _ = timm_config(model)
    chosen = pick_layers(layer, len(info), name or type(model).__name__)
    # CrossViT has a branch of either patch size, one behind the other.
    isotropic = len({stage["reduction"] for stage in info[-2:]}) == 1
    stages = [info[index] for index in chosen]
    channels = tuple(stage.get("num_chs_norm", stage["num_chs"]) if isotropic else stage["num_chs"] for stage in stages)
    features = TimmStages(model, tuple(index - len(info) for index in chosen), isotropic)
    native, fixed = native_size(model)
    strides = tuple(stage["reduction"] for stage in stages)
    standard = chosen == (len(info) - 1,)
    return Source(features, channels, strides, len(info), chosen, name, scaling, standard, native, fixed)


@dataclass
class TimmFeatures:
    """Some of the maps that a timm model built with ``features_only=True`` returns."""

    model: Any
    positions: tuple[int, ...]

    def __call__(self, image: Tensor) -> Maps:
        maps = self.model(match_weights(image, self.model))
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return [maps[position].permute(0, 3, 1, 2) if last else maps[position] for position in self.positions]


def timm_features(model: Any, layer: Layer) -> Source | None:
    """An object made with ``features_only=True``; ``layer`` is the stage's number, not its place among the outputs."""
    info: Any = getattr(model, "feature_info", None)
    if not hasattr(info, "out_indices"):
        return None
    name, scaling, _ = timm_config(model)
    count = len(info.info)
    stages = [index % count for index in info.out_indices]
    chosen = (stages[-1],) if layer is None else pick_layers(layer, count, name or type(model).__name__)
    for index in chosen:
        if index not in stages:
            raise LoftUpError(f"layer {index} of {name} is not among the stages it was built to give: {stages}")
    features = TimmFeatures(model, tuple(stages.index(index) for index in chosen))
    channels, strides = (tuple(info.info[index][key] for index in chosen) for key in ("num_chs", "reduction"))
    # A ViT's maps come without the final norm, a CNN's from whatever stages were asked for.
    native, fixed = native_size(model)
    return Source(features, channels, strides, count, chosen, name, scaling, False, native, fixed)


@dataclass
class HubDino:
    """A DINOv2 or DINOv3 object of torch.hub, used by its own methods."""

    model: Any
    layers: tuple[int, ...]  # none for the model's own features

    def __call__(self, image: Tensor) -> Maps:
        h, w = image.shape[2] // self.model.patch_size, image.shape[3] // self.model.patch_size
        image = match_weights(image, self.model)
        if self.layers:
            order = sorted(set(self.layers))
            maps = self.model.get_intermediate_layers(image, n=order, reshape=True, norm=True)
            return [maps[order.index(layer)] for layer in self.layers]
        output = self.model.forward_features(image)
        if not isinstance(output, dict) or "x_norm_patchtokens" not in output:
            raise LoftUpError(
                f"forward_features of this {type(self.model).__name__} gave no 'x_norm_patchtokens', as torch.hub's "
                "DINOv2 and DINOv3 do; write the function from image (B, 3, H, W) to features (B, C, h, w) yourself"
            )
        tokens: Tensor = output["x_norm_patchtokens"]
        if tokens.shape[1] != h * w:
            raise LoftUpError(f"{type(self.model).__name__} gave {tokens.shape[1]} patch tokens, expected {h} x {w}")
        return [rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w).contiguous()]


def hub_dino(model: Any, layer: Layer) -> Source | None:
    """torch.hub's DinoVisionTransformer, known by its interface."""
    methods = ("forward_features", "get_intermediate_layers", "blocks")
    patch_size, width = getattr(model, "patch_size", None), getattr(model, "embed_dim", None)
    if not (all(hasattr(model, name) for name in methods) and isinstance(patch_size, int) and isinstance(width, int)):
        return None
    count = int(getattr(model, "n_blocks", len(model.blocks)))  # blocks may be nested in chunks
    # Others took over the class with its sizes, for weights of their own: only Meta's package states whose these are.
    official = type(model).__module__.startswith("dinov2.")
    name = dinov2_name(width, count, patch_size, int(getattr(model, "num_register_tokens", 0))) if official else ""
    chosen = pick_layers(layer, count, name or type(model).__name__)
    features = HubDino(model, () if layer is None else chosen)
    sizes = (width,) * len(chosen), (patch_size,) * len(chosen)
    return Source(features, *sizes, count, chosen, name, standard=chosen == (count - 1,), exact=True)


@dataclass
class TransformersMaps:
    """Some of the ``feature_maps`` of a transformers backbone."""

    model: Any
    positions: tuple[int, ...]

    def __call__(self, image: Tensor) -> Maps:
        maps = self.model(match_weights(image, self.model), return_dict=True).feature_maps
        return [maps[position] for position in self.positions]


def transformers_backbone(model: Any, layer: Layer) -> Source | None:
    """A model of ``transformers.AutoBackbone``; ``layer`` is the place among its feature maps."""
    if "BackboneMixin" not in {cls.__name__ for cls in type(model).__mro__}:
        return None
    name = str(getattr(model.config, "_name_or_path", "") or "")
    count = len(model.out_features)
    chosen = pick_layers(layer, count, name or type(model).__name__)
    features = TransformersMaps(model, chosen)
    native = stated_size(model)
    if (measured := measure(model, features, native)) is None:
        return None
    channels, strides = measured
    return Source(features, channels, strides, count, chosen, name, standard=False, native=native)


def stated_size(model: Any) -> tuple[int, int] | None:
    """The (H, W) that a transformers configuration, or a module's attribute, states."""
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "vision_config", None), model):
        for name in ("image_size", "img_size", "crop_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) or (isinstance(size, list | tuple) and len(size) == 2):
                return pair(size)
    return None


def measure(
    model: nn.Module, features: TransformersMaps, native: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Channels and strides of maps, from a run on a black picture: configurations do not state the strides.

    None where they are tokens (``reshape_hidden_states=False``).
    """
    device, failure = next(model.parameters()).device, None
    patch = part(model, "config.patch_size")
    side = patch * 16 if isinstance(patch, int) and 448 % patch else 448  # 64 * 7, 14 * 32
    for size in ((side, side), native):
        if size is None:
            continue
        try:
            with trying(model):
                maps = features(torch.zeros(1, 3, *size, device=device))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # models fail in their own ways
            failure = failure or error
            continue
        if any(each.ndim != 4 for each in maps):
            return None
        return tuple(m.shape[1] for m in maps), tuple(max(1, round(size[0] / m.shape[2])) for m in maps)
    assert failure is not None
    kind = type(model).__name__
    raise LoftUpError(f"{kind} does not take a picture of {side}x{side}: {one_line(failure)}") from failure


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Leave a model's parameters out of the graph that is made meanwhile."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a while; every module gets its mode back."""
    learning = [module for root in roots for module in root.modules() if module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


@contextlib.contextmanager
def trying(*roots: nn.Module) -> Iterator[None]:
    """See what models give: in evaluation mode, without gradients and warnings; random numbers stay as they were."""
    devices = {parameter.device for root in roots for parameter in root.parameters() if parameter.is_cuda}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with evaluating(*roots):
            yield


def modules_of(function: Any) -> list[nn.Module]:
    """The modules that a function is, is bound to, or closes over."""
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        return [module for each in held for module in modules_of(each)]
    cells = getattr(function, "__closure__", None) or ()
    held = [getattr(function, "__self__", None), *(cell.cell_contents for cell in cells if cell != EMPTY)]
    return [each for each in held if isinstance(each, nn.Module)]
