"""Makers of class-agnostic masks: Felzenszwalb's segments at several scales, or any SAM model of transformers."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import LoftUpError
from ...files import stamp
from ..data.felzenszwalb import SCALES, felzenszwalb_map
from ..data.regions import LabelMap
from ..data.sa1b import Annotation, annotate

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FelzenszwalbMaker", "MaskMaker", "SamMaker", "felzenszwalb_masks"]


class MaskMaker(Protocol):
    """What makes the masks of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the masks, as JSON can hold it; written with them and compared when a run is resumed."""

    def __call__(self, picture: "Image.Image") -> list[Annotation]:
        """Make the annotations of a PIL image in RGB, as :func:`loftup.train.data.sa1b.annotate` returns them."""


def felzenszwalb_masks(
    image: "Tensor | Image.Image",
    scales: Sequence[float] = SCALES,
    *,
    sigma: float = 0.8,
    min_size: int = 100,
    side: int = 480,
) -> list[Annotation]:
    """Make masks of all segments at several scales, each once, large ones first; see :func:`felzenszwalb_map`.

    The defaults give about as many masks a photograph as SA-1B has.
    """
    maps = (felzenszwalb_map(image, scale, sigma=sigma, min_size=min_size, side=side) for scale in scales)
    return annotate(mask for segments in maps for mask in _segments(segments))


def _segments(segments: LabelMap) -> Iterator[NDArray[np.bool_]]:
    # In the order of COCO's codes, so that none of the masks has to be transposed.
    labels = np.asfortranarray(segments.labels)
    for value in np.unique(labels):
        yield labels == value


@dataclass(frozen=True)
class FelzenszwalbMaker:
    """Masks by :func:`felzenszwalb_masks`, whose arguments these are; needs no download."""

    scales: Sequence[float] = SCALES
    sigma: float = 0.8
    min_size: int = 100
    side: int = 480

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`MaskMaker`."""
        chosen = {"scales": [float(scale) for scale in self.scales], "sigma": self.sigma}
        return {"maker": "felzenszwalb", **chosen, "min_size": self.min_size, "side": self.side}

    def __call__(self, picture: "Image.Image") -> list[Annotation]:
        """See :class:`MaskMaker`."""
        return felzenszwalb_masks(picture, self.scales, sigma=self.sigma, min_size=self.min_size, side=self.side)


class SamMaker:
    """Masks of a SAM model by transformers' ``mask-generation`` pipeline: a grid of points, one prompt each.

    Args:
        model: name on the Hub (``facebook/sam-vit-base``), folder, or a pipeline that is loaded already.
        device: torch device; a loaded pipeline keeps its own.
        points_per_side: of the grid; more find smaller things, and take longer with their square.
        points_per_batch: prompts decoded at once; fewer need less memory.
        pred_iou_threshold: masks that the model itself gives a lower quality are dropped.
        stability_threshold: masks that change more with the cut-off are dropped, as intersection over union.

    Raises:
        LoftUpError: transformers is missing (extra ``masks``), or the model cannot be loaded or makes no masks.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | Any",
        *,
        device: str = "cpu",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_threshold: float = 0.88,
        stability_threshold: float = 0.95,
    ) -> None:
        self.pipeline = _pipeline(os.fspath(model), device) if isinstance(model, str | os.PathLike) else model
        self.options = {
            "points_per_crop": points_per_side,
            "pred_iou_thresh": pred_iou_threshold,
            "stability_score_thresh": stability_threshold,
        }
        self.points_per_batch = points_per_batch

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`MaskMaker`; a local model by its folder's name and the stamps of its weights."""
        name = self.pipeline.model.name_or_path or type(self.pipeline.model).__name__
        folder = Path(name).expanduser()
        if folder.is_dir():
            weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
            name = " ".join([folder.resolve().name, *map(stamp, weights)])
        return {"maker": "sam", "model": name, **self.options}

    def __call__(self, picture: "Image.Image") -> list[Annotation]:
        """See :class:`MaskMaker`."""
        made = self.pipeline(picture, points_per_batch=self.points_per_batch, **self.options)
        return annotate((np.asarray(mask, dtype=bool) for mask in made["masks"]), made["scores"].tolist())


def _pipeline(model: str, device: str) -> Any:
    try:
        from transformers import pipeline
    except ImportError as error:
        raise LoftUpError('SAM masks need transformers: pip install "loftup[masks]"') from error
    try:
        made = pipeline("mask-generation", model=model, device=device)
        if not hasattr(made.model, "get_image_embeddings"):  # transformers only logs that it is not supported
            raise ValueError(f"a {type(made.model).__name__} makes no masks of points")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoftUpError(
            f"cannot load {model!r} for mask generation: {error}; expected a SAM model of transformers, by its name on "
            "the Hub such as 'facebook/sam-vit-base' or its folder"
        ) from error
    return made
