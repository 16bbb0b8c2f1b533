"""Making class-agnostic masks: Felzenszwalb's segments at several scales, or any SAM model of transformers."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import __version__
from ..errors import LoftUpError
from ..files import stamp
from ..pictures import open_picture
from .folders import by_stem, find_pictures, label_maps
from .regions import LabelMap, centres
from .sa1b import Annotation, annotate, write_file, write_sa1b

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "FelzenszwalbMaker",
    "MaskMaker",
    "MaskReport",
    "SamMaker",
    "felzenszwalb_map",
    "felzenszwalb_masks",
    "make_masks",
]

SCALES = (300.0, 600.0, 1200.0)
# What a picture and the machine can cause; a wrong argument (TypeError) ends the run.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


class MaskMaker(Protocol):
    """What makes the masks of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the masks, as JSON can hold it; written with them and compared when a run is resumed."""

    def __call__(self, picture: "Image.Image") -> list[Annotation]:
        """Make the annotations of a PIL image in RGB, as :func:`loftup.train.sa1b.annotate` returns them."""


def felzenszwalb_map(
    image: "Tensor | Image.Image", scale: float, *, sigma: float = 0.8, min_size: int = 100, side: int = 480
) -> LabelMap:
    """Segment a picture by Felzenszwalb and Huttenlocher's graph-based method, IJCV 2004, as scikit-image has it.

    Args:
        image: (3, H, W) uint8 tensor or PIL image.
        scale: the larger, the fewer and larger the segments; the paper's k for values 0..255.
        sigma: width of the Gaussian that smoothes the picture first, in pixels.
        min_size: pixels that a segment has at least.
        side: a picture with a longer short side is reduced to it first, and its segments enlarged afterwards, so that
            their number depends on what is shown and not on the camera.

    Returns:
        The segments at the picture's size.

    Raises:
        LoftUpError: scikit-image is missing (extra ``masks``).
    """
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise LoftUpError('Felzenszwalb masks need scikit-image: pip install "loftup[masks]"') from error
    pixels = _reduced(_array(image), side)
    labels = felzenszwalb(pixels, scale=scale, sigma=sigma, min_size=min_size)
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    rows, columns = centres((0, 0, *labels.shape), (height, width), *labels.shape)
    return LabelMap(labels[np.ix_(rows, columns)].astype(np.int32))


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


def _array(image: "Tensor | Image.Image") -> NDArray[np.uint8]:
    if not isinstance(image, Tensor):
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[0] != 3 or str(image.dtype) != "torch.uint8":
        raise ValueError(f"image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    return image.movedim(0, -1).cpu().numpy()


def _reduced(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if (short := min(height, width)) <= side:
        return pixels
    from PIL import Image

    size = (round(width * side / short), round(height * side / short))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


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


@dataclass
class MaskReport:
    """What :func:`make_masks` did.

    Attributes:
        counts: masks of each picture that was made, in the order of the pictures.
        finished: pictures that were finished already.
        failed: pictures that could not be read or segmented, with the reason.
    """

    counts: list[int] = field(default_factory=list)
    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def make_masks(
    images: "str | os.PathLike[str]",
    maker: MaskMaker,
    output: "str | os.PathLike[str] | None" = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> MaskReport:
    """Make masks for all pictures of a folder and write them in SA-1B's layout; a run that was cut off is resumed.

    Args:
        images: folder of pictures, and of folders of them.
        maker: of the masks.
        output: folder that the pictures are copied to, beside their masks; None leaves them where they are.
        overwrite: make masks anew that are there already.
        progress: show a bar.

    Returns:
        What was done. A picture that cannot be read is counted there and leaves the others alone.

    Raises:
        LoftUpError: no pictures; some have label maps; two would share a json; a json is there already that was
            made with other settings, of another picture of the name or by another program.
        ValueError: ``output`` is inside ``images``.
        OSError: a file cannot be written; it is named, and nothing half-written remains.
    """
    from tqdm import tqdm

    folder = Path(images).expanduser()
    target = folder if output is None else Path(output).expanduser()
    check_outside(folder, target)
    names = find_pictures(folder)
    if labelled := label_maps(names, folder)[0]:
        name, (first, *_) = next(iter(labelled.items()))
        raise LoftUpError(
            f"{len(labelled)} pictures in {folder} have label maps, such as {first} beside {name}: training takes "
            "those as masks, with data.kind=labels, and no others are needed. To make masks all the same, or if these "
            "are no label maps, take the .png files out"
        )
    pictures = by_stem(names, folder)
    settings = {stem: _settings(maker.settings, folder / name) for stem, name in pictures.items()}
    waiting = {
        stem: name
        for stem, name in pictures.items()
        if overwrite or not _finished(target / f"{stem}.json", target / name, settings[stem])
    }
    report = MaskReport(finished=len(pictures) - len(waiting))
    for stem, name in tqdm(waiting.items(), unit="image", desc="masks", disable=None if progress else True):
        try:
            picture = open_picture(folder / name)
            annotations = maker(picture)
        except FAILURES as error:
            report.failed[name] = " ".join(str(error).split()) or type(error).__name__
            continue
        path = target / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if target != folder:
            write_file(target / name, (folder / name).read_bytes())
        info = {"made_by": f"loftup {__version__}", "settings": settings[stem]}
        write_sa1b(path, annotations, picture.width, picture.height, Path(name).name, info)
        report.counts.append(len(annotations))
    return report


def check_outside(folder: Path, target: Path) -> None:
    """Raise ValueError if what is written to ``target`` would be read as pictures of ``folder`` the next time."""
    if folder.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is inside {folder}, whose pictures include those below it; choose another folder")


def _settings(settings: dict[str, Any], picture: Path) -> dict[str, Any]:
    # The size in bytes tells another picture of the name, and unlike the time stays when a data set is moved.
    return {**settings, "picture_bytes": picture.stat().st_size}


def _finished(path: Path, picture: Path, settings: dict[str, Any]) -> bool:
    """Whether masks and picture are there and made with these settings; LoftUpError if with others."""
    if not path.exists():
        return False
    remedy = "overwrite it (--overwrite) or write to another folder"
    try:
        made_with = dict(json.loads(path.read_bytes())["info"]["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoftUpError(f"{path} was not made by loftup masks; {remedy}") from error
    other = [
        f"{key} {made_with.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted({*settings, *made_with})
        if made_with.get(key) != settings.get(key)
    ]
    if other:
        raise LoftUpError(f"{path} was made with other settings ({'; '.join(other)}); {remedy}")
    return picture.exists()
