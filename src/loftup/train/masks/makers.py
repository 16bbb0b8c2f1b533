"""Makers of class-agnostic masks: Felzenszwalb's segments at several scales, or any SAM model of transformers."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import LoftUpError, translate
from ...files import stamp
from ...weights.hub import cache_alone_if_unreachable
from ..data.felzenszwalb import SCALES, felzenszwalb_map
from ..data.regions import LabelMap
from ..data.sa1b import Annotation, annotate

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FelzenszwalbMaker", "MaskMaker", "SamMaker"]


class MaskMaker(Protocol):
    """A maker of the masks of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the masks, as JSON can hold it; written with them and compared when a run is resumed."""

    def __call__(self, picture: "Image.Image") -> list[Annotation]:
        """Make the annotations of a PIL image in RGB, as :func:`loftup.train.data.sa1b.annotate` returns them."""


@dataclass(frozen=True)
class FelzenszwalbMaker:
    """All segments of :func:`felzenszwalb_map` at several scales, each once, large ones first; needs no download.

    The defaults give about as many masks a photograph as SA-1B has.
    """

    scales: Sequence[float] = SCALES
    sigma: float = 0.8
    min_size: int = 100
    side: int = 480

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`MaskMaker`."""
        scales = [float(scale) for scale in self.scales]
        return {"maker": "felzenszwalb", **dataclasses.asdict(self), "scales": scales}

    def __call__(self, picture: "Tensor | Image.Image") -> list[Annotation]:
        """See :class:`MaskMaker`; takes (3, H, W) uint8 too."""
        options = {"sigma": self.sigma, "min_size": self.min_size, "side": self.side}
        maps = (felzenszwalb_map(picture, scale, **options) for scale in self.scales)  # type: ignore[arg-type]
        return annotate(mask for segments in maps for mask in _segments(segments))


def _segments(segments: LabelMap) -> Iterator[NDArray[np.bool_]]:
    # In the order of COCO's codes, so that none of the masks has to be transposed.
    labels = np.asfortranarray(segments.labels)
    for value in np.unique(labels):
        yield labels == value


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
        outputs = self.pipeline(picture, points_per_batch=self.points_per_batch, **self.options)
        return annotate((np.asarray(mask, dtype=bool) for mask in outputs["masks"]), outputs["scores"].tolist())


def _pipeline(model: str, device: str) -> Any:
    with translate(ImportError, 'SAM masks need transformers: pip install "loftup[masks]"'):
        from transformers import pipeline
    hub = contextlib.nullcontext() if os.path.exists(model) else cache_alone_if_unreachable(str(model))
    try:
        with hub:
            generator = pipeline("mask-generation", model=model, device=device)
        if not hasattr(generator.model, "get_image_embeddings"):  # transformers only logs that it is not supported
            raise ValueError(f"a {type(generator.model).__name__} makes no masks of points")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoftUpError(
            f"cannot load {model!r} for mask generation: {error}; expected a SAM model of transformers, by its name on "
            "the Hub such as 'facebook/sam-vit-base' or its folder"
        ) from error
    return generator
