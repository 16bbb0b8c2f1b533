"""Any vision model as a module from a normalised image (B, 3, H, W) to features (B, C, h, w)."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoftUpError
from ..inputs import Size
from ..weights.catalogue import TINY
from .images import check_image, read_picture, resolve_size, triple
from .layouts import clip_object, open_clip_timm, timm_vit, transformers_vit
from .load import build, build_tiny, resolve
from .maps import evaluating, hub_dino, timm_features, timm_stages, transformers_backbone
from .vit import IMAGENET

__all__ = ["Backbone", "identify", "load_backbone", "wrap"]

FAMILIES = (
    timm_features,
    timm_vit,
    timm_stages,
    open_clip_timm,
    clip_object,
    hub_dino,
    transformers_backbone,
    transformers_vit,
)


class Backbone(nn.Module):
    """A vision model as a function from a normalised image to a feature map.

    Made by :func:`wrap` and :func:`load_backbone`. For a model that they do not know, give a function of your own:
    ``Backbone(model, function, channels=768, patch_size=16)``.

    Args:
        model: the user's model. It is kept as a submodule and never changed.
        features: image (B, 3, H, W), H and W multiples of ``patch_size``, to features (B, C, h, w).
        channels: C.
        patch_size: stride of the feature grid in pixels.
        name: the model's name, "" if unknown.
        mean: per-channel mean that :meth:`preprocess` subtracts from images in [0, 1].
        std: per-channel standard deviation that it divides by.
        layer: index of the layer that the features come from; None for the model's own features.
        trainable: see :func:`wrap`.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Tensor], Tensor],
        *,
        channels: int,
        patch_size: int,
        name: str = "",
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        layer: int | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.features = features
        self.channels = channels
        self.patch_size = patch_size
        self.name = name
        self.mean = triple("mean", mean)
        self.std = triple("std", std)
        self.layer = layer
        self.trainable = trainable
        self._layers = 0
        self._standard = layer is None

    def extra_repr(self) -> str:
        """Name, channels, patch size and layer."""
        return f"name={self.name!r}, channels={self.channels}, patch_size={self.patch_size}, layer={self.layer}"

    def forward(self, image: Tensor) -> Tensor:
        """Extract features.

        Args:
            image: (B, 3, H, W), float, already normalised (see :meth:`preprocess`). Where H or W is not a multiple of
                ``patch_size``, the image is resized bilinearly to the nearest multiple (at least one patch), so that
                the grid covers the whole picture.

        Returns:
            (B, C, h, w), h = round(H / patch_size), w likewise, in the dtype of the model's weights (under autocast: as
            autocast has it). Ordinary tensors also inside ``torch.inference_mode``, so that a probe can be trained on
            them.

        Raises:
            TypeError: not a float tensor.
            ValueError: not (B, 3, H, W), or empty.
            LoftUpError: the model does not take images of this size, or gave something else than features (B, C, h, w).
        """
        check_image(image)
        patch = self.patch_size
        height, width = (max(1, (n + patch // 2) // patch) * patch for n in image.shape[2:])
        if (height, width) != tuple(image.shape[2:]):
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        with contextlib.ExitStack() as stack:
            if not self.trainable:
                stack.enter_context(evaluating(self.model))
                stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and image.requires_grad))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            features = self.features(image)
        if features.ndim != 4 or features.shape[:2] != (len(image), self.channels):
            raise LoftUpError(
                f"{self.name or type(self.model).__name__} gave features of shape {tuple(features.shape)}, expected "
                f"({len(image)}, {self.channels}, h, w)"
            )
        return features

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
    layer: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trainable: bool = False,
) -> Backbone:
    """Turn a model object into a :class:`Backbone`; the object itself stays as it is.

    Args:
        model: one of

            - a timm model, also one made with ``features_only=True``;
            - torch.hub's DINOv2 or DINOv3;
            - a CLIP of open_clip or OpenAI's ``clip``, or its ``.visual``; an open_clip SigLIP;
            - a transformers ``Dinov2Model``, ``Dinov2WithRegistersModel``, ``DINOv3ViTModel``, a CLIP or SigLIP model
              with or without its text tower, or what ``AutoBackbone`` makes;
            - a :class:`Backbone`, which is returned.
        layer: which layer's features to give, negative from the end. In a ViT: a block, whose output gets the final
            norm. In other timm models: a stage, an index into ``feature_info``. In ``AutoBackbone``: an index into
            ``feature_maps``. None: the last one; for CLIP the dense value path, ``out_proj(v_proj(ln_1(x)))`` of the
            last block, then ``ln_post`` and the projection to the space of the text, all as LoftUp was trained on
            ("MaskCLIP"). A CLIP without its projection (``num_classes=0``, ``CLIPVisionModel``)
            keeps its width after ``ln_post``; one with ``layer`` gives plain tokens without the projection, and so do
            timm's CLIPs that were fine-tuned as classifiers (tag ``_ft_``).
        mean: of the images for :meth:`Backbone.preprocess`; None for what the model was trained with.
        std: likewise.
        trainable: whether the model learns. A frozen extractor, the default, always computes in evaluation mode and
            gives the model its mode back afterwards: in training mode, as timm makes models, batch norms would use the
            batch's statistics and change their own. Its parameters get no gradients; an image that requires one does.
            True leaves mode and gradients as they are.

    Returns:
        The backbone, in the training mode that the model is in.

    Raises:
        LoftUpError: the model is not supported, or has no such layer.
        TypeError: not a module.
        ValueError: ``mean`` or ``std`` are not three finite numbers.

    >>> import timm, torch
    >>> backbone = wrap(timm.create_model("vit_tiny_patch16_224").eval())
    >>> backbone(torch.rand(1, 3, 160, 240)).shape
    torch.Size([1, 192, 10, 15])
    """
    if isinstance(model, Backbone):
        return _rewrap(model, layer, mean, std, trainable)
    if not isinstance(model, nn.Module):
        hint = "; for a model by its name: load_backbone(name)" if isinstance(model, str) else ""
        raise TypeError(f"wrap takes a model object (torch.nn.Module), got {type(model).__name__}{hint}")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise LoftUpError(
            f"got a model inside {type(model).__name__}, expected the model; wrap the model itself, then compile the "
            "Backbone or make it parallel"
        )
    for family in FAMILIES:
        if (source := family(model, layer)) is not None:
            break
    else:
        raise LoftUpError(_unsupported(model))
    backbone = Backbone(
        model,
        source.features,
        channels=source.channels,
        patch_size=source.patch_size,
        name=source.name,
        mean=source.scaling[0] if mean is None else mean,
        std=source.scaling[1] if std is None else std,
        layer=None if layer is None else source.layer,
        trainable=trainable,
    )
    backbone._layers = source.layers
    backbone._standard = source.standard
    return backbone


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
        backbone = wrap(model)
    except (LoftUpError, TypeError):
        return None
    return (backbone.name or None) if backbone._standard else None


def load_backbone(
    name: str,
    *,
    weights: "str | os.PathLike[str] | Literal[False] | None" = None,
    layer: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trainable: bool = False,
    **timm_options: Any,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: loftup's name for a backbone with a published upsampler (``dinov2_vits14``, ``clip_vitb16``, ...), another
            package's name for the same, or any timm name. Under timm's names images are normalised with the model's own
            mean and std, under the others with ImageNet's, as in the upsamplers' training. "tiny" is a ViT of 2.9 M
            parameters (C = 192, patch 16) that comes with the package and needs no network.
        weights: None downloads timm's weights from the Hub; a path reads a local file instead, in timm's layout or the
            official DINOv2 or OpenAI CLIP one (safetensors, or a pickle of tensors only); False leaves them random.
        layer: see :func:`wrap`.
        mean: see :func:`wrap`.
        std: see :func:`wrap`.
        trainable: see :func:`wrap`; and whether the parameters require gradients, which they do not by default.
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
        if name == TINY:
            model, scaling = build_tiny(weights, timm_options)
        else:
            timm_name, checkpoint = resolve(name)
            model = build(timm_name, weights, timm_options)
            scaling = (checkpoint.mean, checkpoint.std) if checkpoint else (None, None)
            name = checkpoint.name if checkpoint else ""
        backbone = wrap(model, layer=layer, mean=mean or scaling[0], std=std or scaling[1], trainable=trainable)
        backbone.name = name or backbone.name
        return backbone.eval().requires_grad_(trainable)


def _rewrap(
    backbone: Backbone, layer: int | None, mean: Sequence[float] | None, std: Sequence[float] | None, trainable: bool
) -> Backbone:
    # A layer counted from the end is the same one.
    layers = () if backbone.layer is None else (backbone.layer, backbone.layer - backbone._layers)
    same_mean = mean is None or triple("mean", mean) == backbone.mean
    same_std = std is None or triple("std", std) == backbone.std
    same_layer = layer is None or layer in layers
    if not (same_layer and same_mean and same_std) or (trainable and not backbone.trainable):
        raise LoftUpError(
            f"this is a Backbone already, with layer={backbone.layer}, mean={backbone.mean}, std={backbone.std} and "
            f"trainable={backbone.trainable}; for others wrap its .model"
        )
    return backbone


def _unsupported(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    subject = f"{type(model).__module__}.{type(model).__qualname__}" + (f" (model_type {kind!r})" if kind else "")
    return (
        f"cannot tell how to get a feature map out of {subject}. Looked for: a timm model (feature_info and "
        "forward_intermediates, or built with features_only=True), torch.hub's DINOv2 or DINOv3 (forward_features and "
        "get_intermediate_layers), a CLIP or SigLIP of open_clip or clip (.visual), a transformers DINOv2, DINOv3, "
        "CLIP or SigLIP, or an AutoBackbone (feature_maps). If it holds one of these, wrap that part; else write a "
        "function from image (B, 3, H, W) to features (B, C, h, w) and give "
        "Backbone(model, function, channels=C, patch_size=p)"
    )
