"""The backbone as a module: an image resized to what the model takes, run, and checked."""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoftUpError, one_line
from ..graphs import image_input, write_graph
from ..inputs import Size, output_size
from ..typed import as_in
from .fixed_padding import with_fixed_padding
from .geometry import Geometry, Maps, pad, parts, settle
from .images import check_image, read_picture, resolve_size, triple
from .load import size_options
from .maps import evaluating, frozen, match_weights, modules_of, trying
from .views import check_grid, check_stride, cost, interleave, shifts_a_side, take
from .vit import IMAGENET, Layer, Source

__all__ = ["Backbone"]

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
        views: see :func:`wrap`.
        views_at_once: see :func:`wrap`.
        check: see :func:`wrap`.

    Attributes:
        channels: C, the sum of the layers' where they are joined, a tuple where they are not.
        patch_size: the stride of the model's grid in pixels, as measured, whatever ``views`` is; a tuple for several
            layers that are not joined. For the stride of what the backbone gives see :attr:`stride`.
        views: of each picture, shifted, whose grids are put between one another; 1 for the picture alone.
        multiple: pixels; images are resized so that their sides are multiples of it.
        fixed_size: (H, W) to which every image is resized, for models that take no other; None for any size.
        notes: sentences on what was found and done.
        options: that :func:`load_backbone` gave to the model's library; None for a model that was built elsewhere.

    Raises:
        LoftUpError: the check failed, or the strides do not go with ``views``.
        TypeError: ``model`` is not a module.
        ValueError: ``mean``, ``std``, ``max_side``, ``views`` or ``views_at_once`` is out of range.
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
        views: int = 1,
        views_at_once: int = 1,
        check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, whose mode and device count, got {type(model).__name__}")
        strides = (patch_size,) if isinstance(patch_size, int) else tuple(patch_size)
        widths = (channels,) if isinstance(channels, int) else tuple(channels)
        source = Source(features, widths, strides, len(strides), tuple(range(len(strides))), exact=False)
        self._build(model, source, layer, name, mean, std, trainable, join, max_side, views, views_at_once, check)

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
        views: int,
        views_at_once: int,
        check: bool,
    ) -> None:
        super().__init__()
        shifts_a_side(views)  # before the check, which takes its time
        if max_side is not None and (isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < 1):
            raise ValueError(f"max_side must be a positive integer in pixels, got {max_side!r}")
        self.training = model.training
        self.model = model
        self.features = source.features
        self.name = name
        self.options: dict[str, Any] | None = None
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
        self._strides = geometry.strides
        self._set_views(views, views_at_once)

    def _set_views(self, views: int, at_once: int) -> None:
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"views_at_once must be a positive integer, the views of a batch, got {at_once!r}")
        check_stride(self._strides, views, self.layer)
        self.views, self.views_at_once = views, at_once

    def with_views(self, views: int, *, at_once: int | None = None) -> "Backbone":
        """Make a backbone of the same model with another number of views; nothing is checked again.

        The model itself is shared: what moves, trains or changes one moves, trains or changes both.

        Args:
            views: see :func:`wrap`.
            at_once: see ``views_at_once`` of :func:`wrap`; None keeps it.

        Raises:
            LoftUpError: the strides do not go with so many views.
            ValueError: ``views`` is not 1, 4, 9 or 16, or ``at_once`` no positive integer.

        Examples:
            >>> from loftup import load_backbone
            >>> backbone = load_backbone("tiny")
            >>> backbone.with_views(4)(torch.rand(1, 3, 224, 224)).shape
            torch.Size([1, 192, 28, 28])
        """
        twin = copy.copy(self)
        # Tables of submodules and hooks of its own, so that what is put into one is not put into the other.
        twin.__dict__.update({name: value.copy() for name, value in vars(self).items() if isinstance(value, dict)})
        twin._set_views(views, self.views_at_once if at_once is None else at_once)
        return twin

    @property
    def stride(self) -> Any:
        """Pixels between neighbouring vectors of what :meth:`forward` gives: ``patch_size`` over the views a side.

        An int where it is whole, else a Fraction; a tuple for several layers that are not joined.
        """
        count = shifts_a_side(self.views)
        several = self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,)
        strides = tuple(each // count if each % count == 0 else Fraction(each, count) for each in several)
        return strides if isinstance(self.patch_size, tuple) else strides[0]

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

    def __repr__(self) -> str:
        """The facts on one line; what was found is :meth:`explain`'s."""
        views = f", views={self.views}" if self.views > 1 else ""
        facts = f"channels={self.channels}, patch_size={self.patch_size}, layer={self.layer}{views}"
        return f"{type(self).__name__}({type(self.model).__name__}, name={self.name!r}, {facts})"

    def explain(self) -> str:
        """Say what the features are, and what was found when they were checked, a sentence a line."""
        size = "x".join(map(str, self.fixed_size)) if self.fixed_size else f"multiples of {self.multiple} pixels"
        facts = f"{self.name or type(self.model).__name__}: {self.channels} channels, stride {self.patch_size}, {size}"
        return "\n".join([facts, *self._sentences()])

    def _sentences(self) -> list[str]:
        costs = [cost(self.views, self.views_at_once, self.stride)] if self.views > 1 else []
        return [*self.notes, *costs]

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
            the patch); the model's own grid where the size is fixed; with ``views`` n * n, n times as many each way.
            In the dtype of the model's weights (under autocast: as autocast has it). For several layers a list of such
            maps, or with ``join`` one with their channels one behind the other. Ordinary tensors also inside
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
        with contextlib.ExitStack() as stack:
            if not self.trainable:
                stack.enter_context(self._evaluating())
                stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and image.requires_grad))
                if torch.is_grad_enabled():
                    stack.enter_context(frozen(self.model))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            maps = self._whole(image) if self.views == 1 else self._stitched(image)
        if not self._several:
            return maps[0]
        return torch.cat(maps, 1) if self.join else maps

    if TYPE_CHECKING:

        @as_in(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def _whole(self, image: Tensor) -> Maps:
        """The maps of images of a size that the model takes."""
        return self._checked(self._run_at(pad(image, self._border)), image.shape[0])

    def _stitched(self, image: Tensor) -> Maps:
        """The maps of shifted views of such images, put between one another."""
        count = shifts_a_side(self.views)
        runs: list[Maps] = []
        for views in take(image, self._strides[0], count, self.views_at_once, self._border):
            maps = self._checked(self._run_at(views), views.shape[0])
            for features in maps if not runs and not torch.compiler.is_compiling() else ():
                check_grid(features, image, self._strides[0], self.name or type(self.model).__name__)
            runs.append(maps)
        return interleave(runs, image.shape[0], count)

    def _checked(self, maps: Maps, batch: int) -> Maps:
        for features, channels in zip(maps, self._widths, strict=True):
            if features.ndim != 4 or features.shape[:2] != (batch, channels):
                raise LoftUpError(
                    f"{self.name or type(self.model).__name__} gave features of shape {tuple(features.shape)}, "
                    f"expected ({batch}, {channels}, h, w)"
                )
        return maps

    def _remedy(self) -> str:
        """The option by which timm builds the model for any size, as the end of a sentence."""
        options = size_options(self.model)
        return f"; timm.create_model(..., {options}) builds it for other sizes" if options else ""

    def export(self, path: "str | os.PathLike[str]", *, size: Size = None, store: str = "float32") -> Path:
        """Write the backbone as a graph for other runtimes, without its Python code.

        Its input "image" (batch, 3, height, width) is normalised float32 whose sides are multiples of
        :attr:`multiple`, at least two of them; its output "features" is (batch, C, rows, columns). The file's metadata
        has ``mean``, ``std``, ``channels``, ``stride``, ``multiple``, the model's name and its licence where timm knows
        it. The graph does not check: sides that are no multiples give an error of the runtime, or another grid.

        Args:
            path: see :meth:`LoftUp.export`.
            size: (height, width) in pixels that the graph takes alone, or an int for a square; None for any.
            store: see :meth:`LoftUp.export`.

        Returns:
            The path.

        Raises:
            LoftUpError: the path has another ending, the package onnx or onnxscript is missing
                (``pip install "loftup[export]"``), the model gives several layers, or there is no graph of it for any
                size: then give one.
            ValueError: ``size`` does not fit the model, or there is no such ``store``.
        """
        output = ("features", {0: "batch"} if size or self.fixed_size else {0: "batch", 2: "rows", 3: "columns"})
        return write_graph(*self.graph(self, size), output, path, store, self.card())

    def graph(self, module: nn.Module, size: Size) -> tuple[nn.Module, list[Any]]:
        """A module that starts with this backbone as it can be exported, and its input."""
        if self._several and not self.join:
            raise LoftUpError(f"the backbone gives the layers {self.layer} as a list; a graph has one output: take one")
        size = None if size is None else output_size(size, torch.empty(1, 3, 1, 1))
        fixed = self.fixed_size or size
        if size is not None and self.input_size(*size) != size:
            raise ValueError(
                f"{self.name or type(self.model).__name__} takes {self.input_size(*size)} pixels, got size={size}"
            )
        return with_fixed_padding(module), [image_input(self.multiple, fixed)]

    def card(self) -> dict[str, Any]:
        """Describe the backbone, for exported files."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        facts = {"backbone": self.name, "layer": self.layer, "channels": self.channels, "stride": str(self.stride)}
        facts |= {"multiple": self.multiple, "mean": self.mean, "std": self.std, "views": self.views}
        return facts | {"licence": (config.get("license") if isinstance(config, dict) else None) or "unknown"}

    def preprocess(self, source: Any, size: Size = None) -> Tensor:
        """Turn a picture into the normalised image that :meth:`forward` and the upsampler take.

        Args:
            source: a PIL image or the path of a picture (EXIF orientation is applied, any mode of 8 or 16 bits a
                channel becomes RGB), a uint8 array (H, W, 3) in RGB, or a uint8 tensor (3, H, W) or
                (B, 3, H, W).
            size: (H', W') to resize to, or an int for a square; bicubic, antialiased. None keeps the size.

        Returns:
            (B, 3, H', W') float32, normalised with ``mean`` and ``std``; B = 1 for a single picture. On the tensor's
            device; pictures come on the CPU.

        Raises:
            TypeError: another kind of source.
            ValueError: a tensor or an array of another shape or empty, a picture whose values have no fixed range
                (modes I and F), or a size that is no positive integer or pair of them.
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
