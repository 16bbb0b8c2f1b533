"""Any vision model as a module from a normalised image (B, 3, H, W) to features (B, C, h, w)."""

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoftUpError, one_line
from ..inputs import Size
from .generic import generic
from .geometry import Geometry, Maps, pad, parts, settle
from .images import check_image, read_picture, resolve_size, triple
from .layouts import clip_object, in_text_space, open_clip_timm, timm_vit, transformers_vit
from .load import build_named, size_options
from .maps import (
    evaluating,
    frozen,
    hub_dino,
    match_weights,
    modules_of,
    timm_features,
    timm_stages,
    transformers_backbone,
    trying,
)
from .vit import IMAGENET, Layer, Source
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
MOST_TOKENS = 25_600  # of an image, unless its size was limited or allowed by max_side


class Backbone(nn.Module):
    """A vision model as a function from a normalised image to a feature map.

    Made by :func:`wrap` and :func:`load_backbone`. For a model that they do not know, give a function of your own:
    ``Backbone(model, function, channels=768, patch_size=16)``.

    Args:
        model: the user's model. It is kept as a submodule and never changed.
        features: image (B, 3, H, W) to features (B, C, h, w), or a list of them where ``layer`` is a list.
        channels: C; for several layers a tuple.
        patch_size: stride of the feature grid in pixels; for several layers a tuple.
        name: the model's name, "" if unknown.
        mean: per-channel mean that :meth:`preprocess` subtracts from images in [0, 1].
        std: per-channel standard deviation that it divides by.
        layer: index or name of the layer that the features come from; None for the model's own features.
        trainable: see :func:`wrap`.
        join: see :func:`wrap`.
        max_side: see :func:`wrap`.
        check: see :func:`wrap`.

    Attributes:
        channels: C, the sum of the layers' where they are joined, a tuple where they are not.
        patch_size: the stride of the grid in pixels, as measured; a tuple for several layers that are not joined.
        multiple: pixels; images are resized so that their sides are multiples of it.
        fixed_size: (H, W) to which every image is resized, for models that take no other; None for any size.
        notes: sentences on what was found and done.

    Raises:
        LoftUpError: the check failed.
        TypeError: ``model`` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Tensor], Any],
        *,
        channels: int | Sequence[int],
        patch_size: int | Sequence[int],
        name: str = "",
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        layer: Layer = None,
        trainable: bool = False,
        join: bool = False,
        max_side: int | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, whose mode and device count, got {type(model).__name__}")
        strides = (patch_size,) if isinstance(patch_size, int) else tuple(patch_size)
        widths = (channels,) if isinstance(channels, int) else tuple(channels)
        source = Source(features, widths, strides, len(strides), tuple(range(len(strides))), exact=False)
        self._build(model, source, layer, name, mean, std, trainable, join, max_side, check)

    def _build(
        self,
        model: nn.Module,
        source: Source,
        layer: Layer,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        trainable: bool,
        join: bool,
        max_side: int | None,
        check: bool,
    ) -> None:
        super().__init__()
        if max_side is not None and (isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < 1):
            raise ValueError(f"max_side must be a positive integer in pixels, got {max_side!r}")
        self.training = model.training
        self.model = model
        self.features = source.features
        self.name = name
        self.mean = triple("mean", mean)
        self.std = triple("std", std)
        self.layer = layer
        self.trainable = trainable
        self.join = join
        self.max_side = max_side
        self._several = isinstance(layer, list | tuple)
        self._source = source
        geometry = self._measure(source, check)
        self.multiple, self.fixed_size, self._border = geometry.multiple, geometry.fixed, geometry.border
        self.notes = tuple(filter(None, (source.note, *geometry.notes)))
        self._widths, self._finest = geometry.channels, min(geometry.strides)
        whole = self._several and not join
        self.channels: Any = geometry.channels if whole else sum(geometry.channels)
        self.patch_size: Any = geometry.strides if whole else geometry.strides[0]
        self._told = False
        if join and len(set(geometry.strides)) > 1:
            raise LoftUpError(
                f"the layers {layer} have strides of {', '.join(map(str, geometry.strides))} pixels: only maps of one "
                "stride can be joined; leave join out for a list of maps"
            )

    def _measure(self, source: Source, check: bool) -> Geometry:
        """The geometry as it is, or as it is declared where nothing can be measured."""
        parameter = next(self.model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        fixed = source.native if source.fixed else None
        if not check or device.type == "meta":
            why = "not checked: the weights are on the meta device" if check else "not checked"
            return Geometry(source.channels, source.strides, max(source.strides), fixed, notes=(why,))
        if source.measured is not None:
            return source.measured
        with trying(self.model, *modules_of(self.features)):
            name = self.name or type(self.model).__name__
            return settle(self._try, name, source.strides, device, source.native, source.fixed, source.exact)

    def _try(self, images: Tensor) -> Maps:
        """The maps of pictures, in the weights' dtype as users of half precision give theirs."""
        runs = [self._run(part) for part in parts(match_weights(images, self.model))]
        return runs[0] if len(runs) == 1 else [torch.cat(maps) for maps in zip(*runs, strict=True)]

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Evaluation mode of the model and of the modules that a function of the user's own calls."""
        return evaluating(self.model, *modules_of(self.features))

    def _run_at(self, image: Tensor) -> Maps:
        """The maps, with a failure told as one of this size."""
        try:
            return self._run(image)
        except (torch.cuda.OutOfMemoryError, LoftUpError):
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            size = "x".join(map(str, image.shape[2:]))
            name = self.name or type(self.model).__name__
            raise LoftUpError(f"{name} failed on images of {size}: {one_line(error)[:300]}") from error

    def _run(self, image: Tensor) -> Maps:
        maps = self.features(image)
        return list(maps) if isinstance(maps, list | tuple) else [maps]

    def extra_repr(self) -> str:
        """Name, channels, patch size, layer and what was found."""
        facts = f"name={self.name!r}, channels={self.channels}, patch_size={self.patch_size}, layer={self.layer}"
        return "".join([facts, *(f"\n{note}" for note in self.notes)])

    def explain(self) -> str:
        """Say what the features are, and what was found when they were checked, a sentence a line."""
        size = "x".join(map(str, self.fixed_size)) if self.fixed_size else f"multiples of {self.multiple} pixels"
        facts = f"{self.name or type(self.model).__name__}: {self.channels} channels, stride {self.patch_size}, {size}"
        return "\n".join([facts, *self.notes])

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The (H, W) to which an image of a size is resized for the model.

        Raises:
            LoftUpError: the model's attention would take too much memory, and no ``max_side`` was given.
        """
        if self.fixed_size:
            return self.fixed_size
        longest = max(height, width)
        if self.max_side and longest > self.max_side:
            height, width = (max(1, round(side * self.max_side / longest)) for side in (height, width))
        step = self.multiple
        height, width = (max(1, (side + step // 2) // step) * step for side in (height, width))
        cells = (height // self._finest) * (width // self._finest)
        if self._source.exact and self.max_side is None and cells > MOST_TOKENS:
            raise LoftUpError(
                f"an image of {height}x{width} makes {cells} tokens of {self.name or type(self.model).__name__}, more "
                f"than {MOST_TOKENS}: attention would take many GB and minutes. Pass max_side=1344 (pixels) to wrap or "
                "load_backbone, which makes the image smaller for the model alone; or a larger one if you mean it"
            )
        return height, width

    def forward(self, image: Tensor) -> Any:
        """Extract features.

        Args:
            image: (B, 3, H, W), float, already normalised (see :meth:`preprocess`). It is resized bilinearly to what
                the model takes, so that the grid covers the whole picture: to the nearest multiples of ``multiple``
                (at least one), or to ``fixed_size``, whatever its shape.

        Returns:
            (B, C, h, w), h the resized height / patch_size, w likewise (so round(H / patch_size) where ``multiple`` is
            the patch); the model's own grid where the size is fixed. In the
            dtype of the model's weights (under autocast: as autocast has it). For several layers a list of such maps,
            or with ``join`` one with their channels one behind the other. Ordinary tensors also inside
            ``torch.inference_mode``, so that a probe can be trained on them.

        Raises:
            TypeError: not a float tensor.
            ValueError: not (B, 3, H, W), or empty.
            LoftUpError: the image makes too many tokens, or the model gave something else than features (B, C, h, w).
        """
        check_image(image)
        height, width = self.input_size(image.shape[2], image.shape[3])
        if (height, width) != tuple(image.shape[2:]):
            if self.fixed_size and not self._told:
                self._told = True
                warnings.warn(
                    f"{self.name or type(self.model).__name__} takes {height}x{width} alone: images are resized to it"
                    f"{self._remedy()}",
                    stacklevel=2,
                )
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        image = pad(image, self._border)
        with contextlib.ExitStack() as stack:
            if not self.trainable:
                stack.enter_context(self._evaluating())
                stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and image.requires_grad))
                if torch.is_grad_enabled():
                    stack.enter_context(frozen(self.model))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            maps = self._run_at(image)
        for features, channels in zip(maps, self._widths, strict=True):
            if features.ndim != 4 or features.shape[:2] != (len(image), channels):
                raise LoftUpError(
                    f"{self.name or type(self.model).__name__} gave features of shape {tuple(features.shape)}, "
                    f"expected ({len(image)}, {channels}, h, w)"
                )
        if not self._several:
            return maps[0]
        return torch.cat(maps, 1) if self.join else maps

    def _remedy(self) -> str:
        """The option by which timm builds the model for any size, as the end of a sentence."""
        options = size_options(self.model)
        return f"; timm.create_model(..., {options}) builds it for other sizes" if options else ""

    def preprocess(self, source: Any, size: Size = None) -> Tensor:
        """Turn a picture into the normalised image that :meth:`forward` and the upsampler take.

        Args:
            source: a PIL image or the path of a picture (EXIF orientation is applied, any mode of 8 or 16 bits a
                channel becomes RGB), or a uint8 tensor (3, H, W) or (B, 3, H, W).
            size: (H', W') to resize to, or an int for a square; bicubic, antialiased. None keeps the size.

        Returns:
            (B, 3, H', W') float32, normalised with ``mean`` and ``std``; B = 1 for a single picture. On the tensor's
            device; pictures come on the CPU.

        Raises:
            TypeError: another kind of source.
            ValueError: a tensor of another shape or empty, a picture whose values have no fixed range (modes I and F),
                or a size that is no positive integer or pair of them.
            OSError: the path cannot be read as a picture.
        """
        image = read_picture(source).float() / 255
        if size is not None:
            size = resolve_size(size, image)
            image = F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=True)
            image = image.clamp(0, 1)  # bicubic weights overshoot at edges
        return self.normalise(image)

    def normalise(self, image: Tensor) -> Tensor:
        """Subtract ``mean`` from an image (B, 3, H, W) or (3, H, W) in [0, 1], float, and divide by ``std``."""
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


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
    check: bool = True,
) -> Backbone:
    """Turn a model object into a :class:`Backbone`; the object itself stays as it is.

    Known families give the features of their own code: timm models (also ``features_only=True``), torch.hub's DINOv2
    and DINOv3, CLIP and SigLIP of open_clip, OpenAI's ``clip`` and transformers, ``AutoBackbone``. In any other module
    (torchvision, SAM, ``nn.Sequential``, other transformers models) the last tensor is taken that keeps the picture's
    order. Models inside PEFT, torch.compile, DataParallel or an average of weights are found. What a backbone gives is
    checked on pictures of noise, and said by ``print(backbone.explain())``.

    Args:
        model: a module, or a :class:`Backbone`, which is returned.
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
        check: whether to run the model on small pictures, in which cells were changed, to see that its grid covers the
            picture and features change where the picture does. Strides, sizes and channels are measured on the way.
            Skipped on the meta device.

    Returns:
        The backbone, in the training mode that the model is in.

    Raises:
        LoftUpError: no features were found, they are not in the picture's order, or there is no such layer.
        TypeError: not a module.
        ValueError: ``mean`` or ``std`` are not three finite numbers; ``max_side`` is no positive integer.

    >>> import timm, torch
    >>> backbone = wrap(timm.create_model("vit_tiny_patch16_224").eval())
    >>> backbone(torch.rand(1, 3, 160, 240)).shape
    torch.Size([1, 192, 10, 15])
    """
    if isinstance(model, Backbone):
        return _rewrap(model, layer, mean, std, trainable, join, space, max_side)
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
        check,
    )
    if wrappers:
        backbone.notes = (f"the model inside {', '.join(wrappers)}", *backbone.notes)
    return backbone


def _source(model: nn.Module, layer: Layer) -> Source:
    """What the first family that knows a model makes of it, or what is found by looking."""
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
    check: bool = True,
    **timm_options: Any,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: loftup's name for a backbone with a published upsampler (``dinov2_vits14``, ``clip_vitb16``, ...), another
            package's name for the same, or any timm name; torch.hub's names of DINO, DINOv2 and DINOv3; ``org/name`` of
            a transformers model, or its folder; ``MODEL/TAG`` of open_clip. Images are normalised with the model's own
            mean and std, but for the published upsamplers' names with ImageNet's, as in their training. "tiny" is a ViT
            of 2.9 M parameters (C = 192, patch 16) that comes with the package and needs no network.
        weights: None downloads timm's weights from the Hub; a path reads a local file instead, in timm's layout or the
            official DINOv2 or OpenAI CLIP one (safetensors, or a pickle of tensors only); False leaves them random.
        layer: see :func:`wrap`.
        join: see :func:`wrap`.
        space: see :func:`wrap`.
        mean: see :func:`wrap`.
        std: see :func:`wrap`.
        trainable: see :func:`wrap`; and whether the parameters require gradients, which they do not by default.
        max_side: see :func:`wrap`.
        check: see :func:`wrap`.
        timm_options: for ``timm.create_model``, such as ``pad_type="same"`` or ``output_stride=16``. What timm needs in
            order to take images of any size is added where it can be.

    Returns:
        The backbone in evaluation mode, on the CPU.

    Raises:
        LoftUpError: unknown name, unreachable Hub, missing or wrong file, an option that timm refuses, no such layer.
        TypeError: ``name`` is not a string.

    >>> backbone = load_backbone("resnet18", weights=False, layer=3)
    >>> backbone.name, backbone.channels, backbone.patch_size
    ('resnet18.a1_in1k', 256, 16)
    """
    # Ordinary parameters also when called inside torch.inference_mode().
    with torch.inference_mode(False):
        model, scaling, name = build_named(name, weights, timm_options)
        how: dict[str, Any] = {"layer": layer, "join": join, "space": space, "max_side": max_side, "check": check}
        backbone = wrap(model, mean=mean or scaling[0], std=std or scaling[1], trainable=trainable, **how)
        backbone.name = name or backbone.name
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
