"""Any vision model as a module from a normalised image (B, 3, H, W) to features (B, C, h, w)."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import LoftUpError
from .backbone import Backbone
from .generic import generic
from .images import triple
from .layouts import clip_object, in_text_space, open_clip_timm, timm_vit, transformers_vit
from .load import build_named
from .maps import hub_dino, timm_features, timm_stages, transformers_backbone, trying
from .vit import Layer, Source
from .wrappers import unwrap

__all__ = ["Backbone", "identify", "load_backbone", "wrap"]

FAMILIES = (
    timm_features,
    timm_vit,
    timm_stages,
    open_clip_timm,
    clip_object,
    hub_dino,
    transformers_vit,
    transformers_backbone,
)


def wrap(
    model: nn.Module,
    *,
    layer: Layer = None,
    join: bool = False,
    space: Literal["text"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trainable: bool = False,
    max_side: int | None = None,
    views: int | None = None,
    views_at_once: int | None = None,
    check: bool = True,
) -> Backbone:
    """Turn a model object into a :class:`Backbone`; the object itself stays as it is.

    Known families give the features of their own code: timm models (also ``features_only=True``), torch.hub's DINOv2
    and DINOv3, CLIP and SigLIP of open_clip, OpenAI's ``clip`` and transformers, ``AutoBackbone``. In any other module
    (torchvision, SAM, ``nn.Sequential``, other transformers models) the last tensor is taken that keeps the picture's
    order. Models inside PEFT, torch.compile, DataParallel or an average of weights are found. What a backbone gives is
    checked on pictures of noise, and said by ``print(backbone.explain())``.

    Args:
        model: a module, or a :class:`Backbone`, which is returned; with ``views`` or ``views_at_once`` one that
            shares its model.
        layer: which layer's features to give, negative from the end. In a ViT: a block, whose output gets the final
            norm. In other timm models: a stage, an index into ``feature_info``. In ``AutoBackbone``: an index into
            ``feature_maps``. Elsewhere: a module's name ("encoder.layers.8"), or an index into the longest list of
            blocks, without norm. A list of them gives several maps of one forward. None: the last one; for CLIP the
            dense value path, ``out_proj(v_proj(ln_1(x)))`` of the last block, then ``ln_post`` and the projection to
            the space of the text, all as LoftUp was trained on ("MaskCLIP"). A CLIP without its projection
            (``num_classes=0``, ``CLIPVisionModel``) keeps its width after ``ln_post``; one with ``layer`` gives plain
            tokens without the projection, and so do classifiers made from a CLIP (timm's tag ``_ft_``,
            ``CLIPForImageClassification``) and the trunks of other CLIPs (EVA, PE, MobileCLIP, ViTamin).
        join: of several layers, one map with their channels one behind the other.
        space: "text" projects the features of such trunks to the space of the text.
        mean: of the images for :meth:`Backbone.preprocess`; None for what the model was trained with.
        std: likewise.
        trainable: whether the model learns. A frozen extractor, the default, always computes in evaluation mode and
            gives the model its mode back afterwards: in training mode, as timm makes models, batch norms would use the
            batch's statistics and change their own. Its parameters get no gradients; an image that requires one does.
            True leaves mode and gradients as they are.
        max_side: pixels of an image's longer side, above which the image is made smaller for the model. None leaves
            images as they are, and refuses those of more than 25 600 tokens.
        views: of each picture: 1, 4, 9 or 16. With n * n of them the picture, in the size that the model takes, is
            shifted by n evenly spaced shifts along both axes, in whole pixels and with reflection outside, the model
            runs on each, and the grids are put between one another: (B, C, n * h, n * w), each vector where an
            upsampler expects it. Finer features without training, for n * n passes of the model. None: 1.
        views_at_once: so many of the views in one batch; memory grows with it. None: 1, one after another.
        check: whether to run the model on small pictures, in which cells were changed, to see that its grid covers the
            picture and features change where the picture does. Strides, sizes and channels are measured on the way.
            Skipped on the meta device.

    Returns:
        The backbone, in the training mode that the model is in.

    Raises:
        LoftUpError: no features were found, they are not in the picture's order, there is no such layer, or the
            layers' strides do not go with ``views``.
        TypeError: not a module.
        ValueError: ``mean`` or ``std`` are not three finite numbers; ``max_side`` or ``views_at_once`` is no positive
            integer; ``views`` is not 1, 4, 9 or 16.

    Examples:
        >>> import timm, torch
        >>> backbone = wrap(timm.create_model("vit_tiny_patch16_224").eval())
        >>> backbone(torch.rand(1, 3, 160, 240)).shape
        torch.Size([1, 192, 10, 15])
    """
    if isinstance(model, Backbone):
        model = _rewrap(model, layer, mean, std, trainable, join, space, max_side)
        if views is None and views_at_once is None:
            return model
        return model.with_views(model.views if views is None else views, at_once=views_at_once)
    if not isinstance(model, nn.Module):
        hint = "; for a model by its name: load_backbone(name)" if isinstance(model, str) else ""
        raise TypeError(f"wrap takes a model object (torch.nn.Module), got {type(model).__name__}{hint}")
    if space not in (None, "text"):
        raise ValueError(f"space must be 'text' or None, got {space!r}")
    model, wrappers = unwrap(model)
    source = _source(model, layer)
    if space == "text":
        source = in_text_space(source, model)
    backbone = Backbone.__new__(Backbone)
    listed = isinstance(layer, list | tuple)
    named = isinstance(layer, str) or (listed and any(isinstance(each, str) for each in layer))  # type: ignore[union-attr]
    chosen: Layer = layer if named or layer is None else list(source.chosen) if listed else source.chosen[0]
    backbone._build(
        model,
        source,
        chosen,
        source.name,
        source.scaling[0] if mean is None else mean,
        source.scaling[1] if std is None else std,
        trainable,
        join,
        max_side,
        1 if views is None else views,
        1 if views_at_once is None else views_at_once,
        check,
    )
    if wrappers:
        backbone.notes = (f"the model inside {', '.join(wrappers)}", *backbone.notes)
    return backbone


def _source(model: nn.Module, layer: Layer) -> Source:
    """Take what the first family that knows a model makes of it, or what is found by looking."""
    names = [layer] if isinstance(layer, str) else layer if isinstance(layer, list | tuple) else []
    if not any(isinstance(name, str) for name in names):
        for family in FAMILIES:
            if (source := family(model, layer)) is not None:
                return source
    try:
        with trying(model):
            return generic(model, layer)
    except LoftUpError as error:
        raise LoftUpError(_unsupported(model, str(error))) from error


def identify(model: nn.Module) -> str | None:
    """The name of a backbone object, for looking up the upsampler published for it.

    Args:
        model: a :class:`Backbone`, or anything that :func:`wrap` takes.

    Returns:
        timm's, torch.hub's or transformers' name. None where it cannot be known (open_clip's objects), the model is not
        supported, or the features are not those that upsamplers are trained on: another ``layer``, a CLIP without its
        projection, ``features_only``.
    """
    try:
        backbone = wrap(model, check=False)
    except (LoftUpError, TypeError):
        return None
    return (backbone.name or None) if backbone._source.standard else None


def load_backbone(
    name: str,
    *,
    weights: "str | os.PathLike[str] | Literal[False] | None" = None,
    layer: Layer = None,
    join: bool = False,
    space: Literal["text"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trainable: bool = False,
    max_side: int | None = None,
    views: int = 1,
    views_at_once: int = 1,
    check: bool = True,
    **timm_options: Any,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: loftup's name for a backbone with a published upsampler (``dinov2_vits14``, ``clip_vitb16``, ...), another
            package's name for the same, or any timm name; torch.hub's names of DINO, DINOv2 and DINOv3; ``org/name`` of
            a transformers model, or its folder; ``MODEL/TAG`` of open_clip. Images are normalised with the model's own
            mean and std, but for the published upsamplers' names with ImageNet's, as in their training. Two come with
            the package and need no network, both with C = 192 and patch 16: "tiny", two transformer blocks on
            MobileNetV2's convolutions (2.8 M parameters), distilled from a DINOv2 ViT-S/14; and "tiny_v1", the ViT of
            six blocks (2.9 M) that had this name before, for results that were made with it.
        weights: None downloads timm's weights from the Hub; a path reads a local file instead, in timm's layout or the
            official DINOv2 or OpenAI CLIP one (safetensors, or a pickle of tensors only); False leaves them random.
        layer: see :func:`wrap`.
        join: see :func:`wrap`.
        space: see :func:`wrap`.
        mean: see :func:`wrap`.
        std: see :func:`wrap`.
        trainable: see :func:`wrap`; and whether the parameters require gradients, which they do not by default.
        max_side: see :func:`wrap`.
        views: see :func:`wrap`.
        views_at_once: see :func:`wrap`.
        check: see :func:`wrap`.
        timm_options: for ``timm.create_model``, such as ``pad_type="same"`` or ``output_stride=16``. What timm needs in
            order to take images of any size is added where it can be.

    Returns:
        The backbone in evaluation mode, on the CPU.

    Raises:
        LoftUpError: unknown name, unreachable Hub, missing or wrong file, an option that timm refuses, no such layer.
        TypeError: ``name`` is not a string.
        ValueError: see :func:`wrap`.

    Examples:
        >>> backbone = load_backbone("resnet18", weights=False, layer=3)
        >>> backbone.name, backbone.channels, backbone.patch_size
        ('resnet18.a1_in1k', 256, 16)
    """
    # Ordinary parameters also when called inside torch.inference_mode().
    with torch.inference_mode(False):
        model, scaling, name = build_named(name, weights, timm_options)
        how: dict[str, Any] = {"layer": layer, "join": join, "space": space, "max_side": max_side, "check": check}
        how |= {"views": views, "views_at_once": views_at_once}
        backbone = wrap(model, mean=mean or scaling[0], std=std or scaling[1], trainable=trainable, **how)
        backbone.name = name or backbone.name
        backbone.options = dict(timm_options)
        return backbone.eval().requires_grad_(trainable)


def _rewrap(
    backbone: Backbone,
    layer: Layer,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    trainable: bool,
    join: bool,
    space: str | None,
    max_side: int | None,
) -> Backbone:
    # A layer counted from the end is the same one.
    own = backbone.layer
    layers = (own, own - backbone._source.layers) if isinstance(own, int) else (own,)
    same_mean = mean is None or triple("mean", mean) == backbone.mean
    same_std = std is None or triple("std", std) == backbone.std
    same_layer = layer is None or layer in layers
    same_side = max_side is None or max_side == backbone.max_side
    more = (trainable and not backbone.trainable) or (join and not backbone.join) or space is not None
    if not (same_layer and same_mean and same_std and same_side) or more:
        asked = "" if space is None else f" (space={space!r} is chosen when the model is wrapped)"
        raise LoftUpError(
            f"this is a Backbone already, with layer={backbone.layer}, mean={backbone.mean}, std={backbone.std}, "
            f"join={backbone.join}, max_side={backbone.max_side} and trainable={backbone.trainable}{asked}; for others "
            "wrap its .model"
        )
    return backbone


def _unsupported(model: nn.Module, seen: str) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    subject = f"{type(model).__module__}.{type(model).__qualname__}" + (f" (model_type {kind!r})" if kind else "")
    if isinstance(model, torch.jit.ScriptModule):
        seen += ". torch.jit shows nothing but the result: wrap the module before it is scripted or traced"
    return (
        f"found no feature map in {subject}: {seen}. If it holds an image encoder, wrap that part; else write a "
        "function from image (B, 3, H, W) to features (B, C, h, w) and give "
        "Backbone(model, function, channels=C, patch_size=p)"
    )
