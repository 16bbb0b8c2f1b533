"""A backbone and its upsampler together."""

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .backbones import Backbone, wrap
from .errors import LoftUpError
from .graphs import write_graph
from .inference.canvas import Head
from .inputs import Size, refuse_names
from .model import LoftUp
from .typed import as_in
from .weights.catalogue import ANY, fitting

__all__ = ["Upsampled"]


class Upsampled(nn.Module):
    """A backbone and its upsampler in one: image to features at the image's resolution, or any other.

    Args:
        backbone: a :class:`Backbone`, or anything that :func:`wrap` takes.
        up: the upsampler, called as ``up(features, image, size=size)``.
        views: shifted views of each image that the backbone looks at, see :func:`wrap`; None leaves a
            :class:`Backbone` as it is, and takes 1 for other models. The caller's object is not changed.

    Raises:
        LoftUpError: the upsampler expects another number of channels.
        TypeError: not two modules, or the two swapped.
        ValueError: ``views`` is not 1, 4, 9 or 16.
    """

    def __init__(self, backbone: nn.Module, up: nn.Module, *, views: int | None = None) -> None:
        super().__init__()
        if isinstance(backbone, LoftUp) or isinstance(up, Backbone):
            raise TypeError("backbone and up look swapped: call Upsampled(backbone, up)")
        if not isinstance(up, nn.Module):
            hint = "; for weights by their name: LoftUp.from_pretrained(name)" if isinstance(up, str) else ""
            raise TypeError(f"up must be an upsampler (torch.nn.Module), got {type(up).__name__}{hint}")
        self.backbone = wrap(backbone, views=views)
        self.up = up
        expected = getattr(getattr(up, "config", None), "channels", None)
        several = self.backbone.channels if isinstance(self.backbone.channels, tuple) else (self.backbone.channels,)
        for channels in several if expected is not None else ():
            if channels == expected:
                continue
            name = self.backbone.name or type(self.backbone.model).__name__
            raise LoftUpError(
                f"the backbone {name!r} gives {channels} channels, the upsampler expects {expected}{fitting(channels)}"
                f"; for any backbone: LoftUp.from_pretrained({ANY!r})"
            )
        if different := _differences(self.backbone, getattr(up, "config", None)):
            warnings.warn(f"{different}: the upsampled features may be worse than bilinear ones", stacklevel=2)

    def forward(
        self,
        image: Tensor,
        size: Size = None,
        *,
        head: Head | Tensor | None = None,
        memory: int | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        **others: NoReturn,
    ) -> Any:
        """Extract features and upsample them.

        Args:
            image: (B, 3, H, W), normalised for the backbone; also the upsampler's guidance.
            size: (H', W') of the result, None for (H, W).
            head: see :meth:`LoftUp.forward`; of several layers, applied to each.
            memory: see :meth:`LoftUp.forward`.
            backend: see :meth:`LoftUp.forward`.
            dtype: of the features that are upsampled and of the result, such as torch.float16 to halve it; None leaves
                them in the backbone's.
            others: nothing; another name is refused, with the right one.

        Returns:
            (B, C, H', W'), with ``head`` what it gives; a list of them where the backbone gives several layers.
        """
        if others:
            refuse_names(others, ("size", "head", "memory", "backend", "dtype"))
        features = self.backbone(image)
        options = {"head": head, "memory": memory, "backend": backend}
        # Upsamplers of others have none of these.
        options = {name: value for name, value in options.items() if value is not None}
        if isinstance(features, list):
            return [self.up(each.to(dtype), image, size=size, **options) for each in features]
        return self.up(features.to(dtype), image, size=size, **options)

    if TYPE_CHECKING:

        @as_in(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def regions(self, image: Tensor, masks: Tensor, size: Size = None, **options: Any) -> Any:
        """Mean upsampled features within masks or labels; see :meth:`LoftUp.regions`, whose options it takes.

        Args:
            image: (B, 3, H, W), normalised for the backbone; also the upsampler's guidance.
            masks: (B, N, H', W'), (N, H', W'), or integer labels (B, H', W').
            size: (H', W') of the map that is averaged; None means the masks' own.
            options: ``count``, ``memory`` and ``backend``.

        Returns:
            (B, N, C); a list of them where the backbone gives several layers.

        Raises:
            LoftUpError: the upsampler is none of loftup's.
        """
        if not isinstance(self.up, LoftUp):
            raise LoftUpError(f"up is a {type(self.up).__name__}; only a LoftUp averages over regions")
        features = self.backbone(image)
        if isinstance(features, list):
            return [self.up.regions(each, image, masks, size, **options) for each in features]
        return self.up.regions(features, image, masks, size, **options)

    def many(self, images: Iterable[Tensor], size: Size = None, *, batch: int = 8, **options: Any) -> list[Any]:
        """Extract and upsample the features of images of different sizes; those of one size share batches.

        Args:
            images: each (3, H, W), normalised for the backbone.
            size: (H', W') of every result, None for each image's own.
            batch: images that are computed at once, at most.
            options: of :meth:`forward`.

        Returns:
            In the order of the images, each (C, H', W') or what ``head`` gives; a list of them for several layers.

        Raises:
            ValueError: an image has another number of dimensions, or ``batch`` is not positive.

        Examples:
            >>> from loftup import load_backbone
            >>> both = Upsampled(load_backbone("tiny"), LoftUp.from_pretrained("any"))
            >>> [tuple(each.shape) for each in both.many([torch.rand(3, 64, 80), torch.rand(3, 48, 48)])]
            [(192, 64, 80), (192, 48, 48)]
        """
        if batch < 1:
            raise ValueError(f"batch must be a positive integer, got {batch!r}")
        images = list(images)
        groups: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            if image.ndim != 3:
                raise ValueError(
                    f"image {index} must be (3, H, W), got shape {tuple(image.shape)}; for a batch, call it"
                )
            groups.setdefault((image.shape, image.dtype, image.device), []).append(index)
        results: list[Any] = [None] * len(images)
        for group in groups.values():
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                dense = self(torch.stack([images[index] for index in part]), size, **options)
                for place, index in enumerate(part):
                    results[index] = [each[place] for each in dense] if isinstance(dense, list) else dense[place]
        return results

    def export(self, path: "str | os.PathLike[str]", *, size: Size = None, store: str = "float32") -> Path:
        """Write backbone and upsampler as one graph for other runtimes.

        Its input "image" (batch, 3, height, width) is that of :meth:`Backbone.export`; its output "upsampled" is
        (batch, C, height, width). Arguments, result and errors are those of :meth:`Backbone.export`.

        Raises:
            LoftUpError: also where the upsampler is none of loftup's.
        """
        if not isinstance(self.up, LoftUp):
            raise LoftUpError(f"up is a {type(self.up).__name__}; only a LoftUp is exported")
        module, inputs = self.backbone.graph(self, size)
        whole = {0: "batch"} if size or self.backbone.fixed_size else {0: "batch", 2: "height", 3: "width"}
        return write_graph(module, inputs, ("upsampled", whole), path, store, self.up.card() | self.backbone.card())


def _differences(backbone: Backbone, config: Any) -> str:
    """Say where the features are others of the backbone than the upsampler learned from; "" where they are not."""
    trained_on = getattr(config, "trained_on", None)
    if trained_on is None or config.backbone != backbone.name:
        return ""
    have: dict[str, Any] = {"layer": backbone.layer, "views": backbone.views}
    # As JSON has it, where tuples are lists.
    have |= {} if backbone.options is None else {"options": json.loads(json.dumps(backbone.options, default=str))}
    trained_on = json.loads(json.dumps(dict(trained_on), default=str))
    names = [name for name, value in trained_on.items() if have.get(name, value) != value]
    if not names:
        return ""
    got = ", ".join(f"{name}={have[name]!r}" for name in names)
    expected = ", ".join(f"{name}={trained_on[name]!r}" for name in names)
    return f"the upsampler was trained on {backbone.name!r} with {expected}, got {got}"
