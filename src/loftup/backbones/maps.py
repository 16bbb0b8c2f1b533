"""Models that make feature maps themselves: timm's other families, torch.hub's DINOv2 and v3, AutoBackbone."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import LoftUpError
from .vit import IMAGENET, Scaling, Source, pair, pick_layer

__all__ = ["evaluating", "hub_dino", "timm_features", "timm_stages", "transformers_backbone"]

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


class FixedSize:
    """The image size that a timm model insists on, and the error that says how to build it without.

    Patch embeddings that check the size are asked beforehand; other models of fixed size fail somewhere inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        name, _, config = timm_config(model)
        self.strict = next((m for m in model.modules() if getattr(m, "strict_img_size", False)), None)
        self.size = tuple(config.get("input_size", ()))[1:] if config.get("fixed_input_size") else None
        classes = [type(m) for m in (model, getattr(model, "model", None)) if m is not None]
        parameters = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
        options = [f"{key}={value}" for choice in FLEXIBLE for key, value in choice.items() if key in parameters]
        build = f"timm.create_model({config.get('architecture', '...')!r}, {(options or ['img_size=(H, W)'])[0]})"
        self.name = name or type(model).__name__
        self.remedy = f"build it with {build}" + (", or with load_backbone, which does so" if options else "")

    def error(self, image: Tensor, size: tuple[int, ...]) -> LoftUpError:
        """The error for an image of another size."""
        got, expected = "x".join(map(str, image.shape[2:])), "x".join(map(str, size))
        return LoftUpError(f"{self.name} was built for images of {expected} and does not take {got}; {self.remedy}")

    def run(self, call: Any, image: Tensor) -> Any:
        """``call(image)``, with failures that come from the image's size explained."""
        strict_size = getattr(self.strict, "img_size", None)
        if strict_size is not None and tuple(image.shape[2:]) != pair(strict_size):
            raise self.error(image, pair(strict_size))
        try:
            return call(match_weights(image, self.model))
        except torch.cuda.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            if self.size and tuple(image.shape[2:]) != self.size:
                raise self.error(image, self.size) from error
            raise


@dataclass
class TimmStages:
    """A stage of any timm model by ``forward_intermediates``, stopping early.

    The stage is counted from the end: older timm counts a stem, which ``feature_info`` leaves out, as the first.
    """

    model: Any
    stage: int
    norm: bool
    size: FixedSize

    def __call__(self, image: Tensor) -> Tensor:
        options = {"indices": [self.stage], "norm": self.norm, "output_fmt": "NCHW"}
        run = functools.partial(self.model.forward_intermediates, stop_early=True, intermediates_only=True, **options)
        (stage,) = self.size.run(run, image)
        return stage  # type: ignore[no-any-return]


def timm_stages(model: Any, layer: int | None) -> Source | None:
    """CNNs, hierarchical transformers, Eva (EVA02, DINOv3) and every other timm model with ``feature_info``.

    Models whose layers all have the same stride get their final norm, as plain ViTs do; stages of the others come as
    ``features_only=True`` gives them.
    """
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list) or not info or not hasattr(model, "forward_intermediates"):
        return None
    name, scaling, _ = timm_config(model)
    index = pick_layer(layer, len(info), name or type(model).__name__)
    isotropic = len({stage["reduction"] for stage in info}) == 1
    stage, last = info[index], index == len(info) - 1
    channels = stage.get("num_chs_norm", stage["num_chs"]) if isotropic else stage["num_chs"]
    features = TimmStages(model, index - len(info), isotropic, FixedSize(model))
    return Source(features, channels, stage["reduction"], len(info), index, name, scaling, standard=last)


@dataclass
class TimmFeatures:
    """One of the maps that a timm model built with ``features_only=True`` returns."""

    model: Any
    position: int
    size: FixedSize

    def __call__(self, image: Tensor) -> Tensor:
        maps = self.size.run(self.model, image)
        stage: Tensor = (list(maps.values()) if isinstance(maps, dict) else list(maps))[self.position]
        return stage.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else stage


def timm_features(model: Any, layer: int | None) -> Source | None:
    """An object made with ``features_only=True``; ``layer`` is the stage's number, not its place among the outputs."""
    info: Any = getattr(model, "feature_info", None)
    if not hasattr(info, "out_indices"):
        return None
    name, scaling, _ = timm_config(model)
    count = len(info.info)
    stages = [index % count for index in info.out_indices]
    index = stages[-1] if layer is None else pick_layer(layer, count, name or type(model).__name__)
    if index not in stages:
        raise LoftUpError(f"layer {layer} of {name} is not among the stages it was built to give, out_indices={stages}")
    features, stage = TimmFeatures(model, stages.index(index), FixedSize(model)), info.info[index]
    # A ViT's maps come without the final norm, a CNN's from whatever stages were asked for.
    return Source(features, stage["num_chs"], stage["reduction"], count, index, name, scaling, standard=False)


@dataclass
class HubDino:
    """A DINOv2 or DINOv3 object of torch.hub, used by its own methods."""

    model: Any
    layer: int | None

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[2] // self.model.patch_size, image.shape[3] // self.model.patch_size
        image = match_weights(image, self.model)
        if self.layer is not None:
            (stage,) = self.model.get_intermediate_layers(image, n=[self.layer], reshape=True, norm=True)
            return stage  # type: ignore[no-any-return]
        output = self.model.forward_features(image)
        if not isinstance(output, dict) or "x_norm_patchtokens" not in output:
            raise LoftUpError(
                f"forward_features of this {type(self.model).__name__} gave no 'x_norm_patchtokens', as torch.hub's "
                "DINOv2 and DINOv3 do; write the function from image (B, 3, H, W) to features (B, C, h, w) yourself"
            )
        tokens: Tensor = output["x_norm_patchtokens"]
        if tokens.shape[1] != h * w:
            raise LoftUpError(f"{type(self.model).__name__} gave {tokens.shape[1]} patch tokens, expected {h} x {w}")
        return rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w).contiguous()


def hub_dino(model: Any, layer: int | None) -> Source | None:
    """torch.hub's DinoVisionTransformer, known by its interface."""
    methods = ("forward_features", "get_intermediate_layers", "blocks")
    patch_size, width = getattr(model, "patch_size", None), getattr(model, "embed_dim", None)
    if not (all(hasattr(model, name) for name in methods) and isinstance(patch_size, int) and isinstance(width, int)):
        return None
    count = int(getattr(model, "n_blocks", len(model.blocks)))  # blocks may be nested in chunks
    name = dinov2_name(width, count, patch_size, int(getattr(model, "num_register_tokens", 0)))
    index = pick_layer(layer, count, name or type(model).__name__)
    features = HubDino(model, None if layer is None else index)
    return Source(features, width, patch_size, count, index, name, standard=index == count - 1)


@dataclass
class TransformersMaps:
    """One of the ``feature_maps`` of a transformers backbone."""

    model: Any
    position: int

    def __call__(self, image: Tensor) -> Tensor:
        output = self.model(match_weights(image, self.model), return_dict=True)
        return output.feature_maps[self.position]  # type: ignore[no-any-return]


def transformers_backbone(model: Any, layer: int | None) -> Source | None:
    """A model of ``transformers.AutoBackbone``; ``layer`` is the place among its feature maps."""
    if "BackboneMixin" not in {cls.__name__ for cls in type(model).__mro__}:
        return None
    name = str(getattr(model.config, "_name_or_path", "") or "")
    count = len(model.out_features)
    index = pick_layer(layer, count, name or type(model).__name__)
    features = TransformersMaps(model, index)
    channels, stride = measure(model, features)
    return Source(features, channels, stride, count, index, name, standard=False)


def measure(model: nn.Module, features: TransformersMaps) -> tuple[int, int]:
    """Channels and stride of a map, from one run on a black picture: configurations do not state the stride."""
    image = torch.zeros(1, 3, 224, 224, device=next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        maps = features(image)
    if maps.ndim != 4:
        raise LoftUpError(
            f"the feature maps of this {type(model).__name__} have shape {tuple(maps.shape)}, expected (B, C, h, w); "
            "build it with reshape_hidden_states=True"
        )
    return maps.shape[1], image.shape[2] // maps.shape[2]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; every module gets its mode back."""
    learning = [module for module in model.modules() if module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True
