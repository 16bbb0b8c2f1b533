"""SA-1B's layout: ``NAME.json`` beside ``NAME.jpg``, masks as COCO run-length codes."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import translate
from ...files import write_atomically
from .regions import Picture, RleMasks, UnreadableError

__all__ = ["annotate", "read_sa1b", "require_pycocotools", "write_file", "write_sa1b"]

Annotation = dict[str, Any]


def annotate(masks: Iterable[NDArray[np.bool_]], scores: Iterable[float] | None = None) -> list[Annotation]:
    """Masks as SA-1B's annotations, large ones first: where they are applied one after another, the small ones stay.

    Args:
        masks: (H, W) arrays of one size; empty ones, and all but the first of the same masks, are left out.
        scores: the maker's estimate of each mask's quality, written as ``predicted_iou``.

    Returns:
        Dicts with ``segmentation`` (compressed run-length code), ``bbox`` (left, top, width, height), ``area`` (in
        pixels), ``crop_box`` (the whole picture), ``id`` (counted from 0), and ``predicted_iou`` if scores are given.

    Raises:
        LoftUpError: pycocotools is missing (extra ``masks``).
    """
    rle = require_pycocotools()
    annotations: dict[str, Annotation] = {}
    for mask, score in zip(masks, repeat(None) if scores is None else scores, strict=scores is not None):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        counts, area = code["counts"].decode("ascii"), int(rle.area(code))
        if not area or counts in annotations:
            continue
        annotations[counts] = {
            "segmentation": {"size": list(mask.shape), "counts": counts},
            "bbox": [int(value) for value in rle.toBbox(code)],
            "area": area,
            "crop_box": [0, 0, mask.shape[1], mask.shape[0]],
            **({} if score is None else {"predicted_iou": round(float(score), 6)}),
        }
    ordered = sorted(annotations.values(), key=lambda annotation: -annotation["area"])
    return [{**annotation, "id": index} for index, annotation in enumerate(ordered)]


def write_sa1b(
    path: "str | os.PathLike[str]",
    annotations: Sequence[Annotation],
    width: int,
    height: int,
    file_name: str,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a picture's annotations as SA-1B does, whole or not at all; the same arguments give the same bytes.

    Args:
        path: ``NAME.json``.
        annotations: as :func:`annotate` makes them.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        file_name: of the picture, which lies beside the file.
        info: how the masks were made; ``loftup masks`` compares it when it resumes.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; it is named.
    """
    image = {"image_id": Path(file_name).stem, "width": width, "height": height, "file_name": file_name}
    content = {**({"info": info} if info is not None else {}), "image": image, "annotations": list(annotations)}
    write_file(Path(path), (json.dumps(content, separators=(",", ":")) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; the OSError names it, which that of a full disk does not by itself."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_sa1b(name: str, image: Tensor, content: bytes, where: str) -> Picture:
    """Put a picture and the annotations of its json together.

    Args:
        name: of the picture, see :class:`Picture`.
        image: (3, H, W) uint8.
        content: of the json file.
        where: what to call the json in errors.

    Raises:
        UnreadableError: the json is damaged, holds other than run-length codes, or is of a picture of another size.
    """
    height, width = image.shape[1:]
    try:
        fields = json.loads(content)
        size = (fields["image"]["height"], fields["image"]["width"])
        if size != (height, width):
            raise UnreadableError(
                f"{where} is of a picture of {size[0]}x{size[1]}, {name} has {height}x{width}; make its masks anew"
            )
        return Picture(name, image, RleMasks([a["segmentation"] for a in fields["annotations"]], (height, width)))
    except UnreadableError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnreadableError(f"cannot read {where} as SA-1B's annotations: {_reason(error)}") from error


def require_pycocotools() -> Any:
    """The module ``pycocotools.mask``, or a LoftUpError that names the extra."""
    with translate(ImportError, 'run-length codes need pycocotools: pip install "loftup[masks]"'):
        from pycocotools import mask
    return mask


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
