"""Felzenszwalb and Huttenlocher's segments of a picture, as one label map."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import translate
from .regions import LabelMap, centres

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SCALES", "felzenszwalb_map"]

SCALES = (300.0, 600.0, 1200.0)


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
    with translate(ImportError, 'Felzenszwalb masks need scikit-image: pip install "loftup[masks]"'):
        from skimage.segmentation import felzenszwalb
    pixels = _reduced(_array(image), side)
    labels = felzenszwalb(pixels, scale=scale, sigma=sigma, min_size=min_size)
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    rows, columns = centres((0, 0, *labels.shape), (height, width), *labels.shape)
    return LabelMap(labels[np.ix_(rows, columns)].astype(np.int32))


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
