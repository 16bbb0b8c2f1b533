"""Pictures' files as pixels, of the sizes that the networks take; 8 bits a value on the way to them."""

import contextlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FAILURES, one_line, translate
from ..inference.regions import VOID
from ..pictures import open_picture, require_pillow, scaled, usual_size
from . import storage
from .settings import Settings
from .sources import Place, contents

__all__ = ["Prepared", "decode", "load", "prepare", "resized", "result_size"]

AT_ONCE = 32  # pictures whose files are in memory before they are decoded and small


@dataclass(frozen=True)
class Prepared:
    """A picture ready to be computed, or the reason why it is none."""

    place: Place
    size: tuple[int, int] = (0, 0)  # (H, W) of the picture, upright
    small: "np.ndarray | None" = None  # uint8 (3, h, w), for the backbone
    guidance: "np.ndarray | None" = None  # uint8 (3, H', W'), for the upsampler
    masks: "np.ndarray | None" = None  # int64 (H', W')
    error: str = ""


def decode(content: bytes, name: str = "") -> Tensor:
    """Pixels of a picture's file, upright, uint8 (3, H, W) in RGB; JPEG by torchvision, all else by Pillow.

    Raises:
        OSError: the bytes are no picture that can be read.
        LoftUpError: a picture whose values have no fixed range.
    """
    stream = BytesIO(content)
    try:
        with require_pillow().open(stream) as header:  # refuses what would fill the memory
            plain = header.format == "JPEG" and header.mode in ("RGB", "L")
    except Exception:  # open_picture says it
        plain = False
    if plain:
        # Without torchvision's, which is deprecated, Pillow gives the same pixels in half as much time again.
        with contextlib.suppress(RuntimeError, ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torchvision.io import ImageReadMode, decode_jpeg

            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return pixels
    stream.seek(0)
    picture = open_picture(stream, name)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def result_size(settings: Settings, height: int, width: int) -> tuple[int, int]:
    """(H', W') of the upsampled outputs of a picture."""
    return settings.size or usual_size(height, width)


def prepare(pixels: Tensor, settings: Settings) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture for the backbone and the one for the upsampler, uint8, from pixels uint8 (3, H, W).

    They are resized as :meth:`loftup.Backbone.preprocess` does and rounded to 8 bits.
    """
    height, width = pixels.shape[1:]
    short = min(height, width)
    small = scaled(height, width, min(settings.input, short) / short)
    wanted = result_size(settings, height, width) if settings.upsamples or settings.images else None
    first = resized(pixels, small)
    return first, first if wanted == small else resized(pixels, wanted) if wanted else None


def resized(pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """uint8 (3, H, W) at another size, bicubic and antialiased, rounded."""
    if size == tuple(pixels.shape[1:]):
        return pixels.numpy()
    values = F.interpolate(pixels[None].float(), size, mode="bicubic", align_corners=False, antialias=True)
    return values[0].round_().clamp_(0, 255).to(torch.uint8).numpy()


def load(places: Sequence[Place], settings: Settings, threads: int = 1) -> list[Prepared]:
    """Read, decode and resize the pictures of a part, in threads; what cannot be read bears its error."""
    prepared: list[Prepared] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), AT_ONCE):
            some = places[start : start + AT_ONCE]
            prepared += pool.map(_load, some, contents(some), repeat(settings))
    return prepared


def _load(place: Place, content: "bytes | OSError", settings: Settings) -> Prepared:
    try:
        if isinstance(content, OSError):
            raise content
        pixels = decode(content, place.key)
        small, guidance = prepare(pixels, settings)
        size = (pixels.shape[1], pixels.shape[2])
        masks = None if settings.masks is None else _masks(place, settings, guidance)
        return Prepared(place, size, small, guidance, masks)
    except FAILURES as error:
        return Prepared(place, error=one_line(error))


def _masks(place: Place, settings: Settings, guidance: np.ndarray | None) -> np.ndarray:
    """The label map of a picture, int64 (H', W'), at the size of the upsampled outputs."""
    from PIL import Image

    assert settings.masks is not None
    assert guidance is not None
    stem, dot, _ = place.key.rpartition(".")
    url = storage.join(settings.masks, f"{stem if dot else place.key}.png")
    content = storage.read(url)
    with (
        translate(OSError, f"cannot read the masks {url}: they are no picture", OSError),
        Image.open(BytesIO(content)) as picture,
    ):
        if picture.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"the masks {url} have mode {picture.mode!r}; expected one label a pixel: L, P, I or I;16")
        labels = torch.from_numpy(np.array(picture).astype(np.int64))
        if picture.mode in ("L", "P"):
            labels[labels == VOID] = -1
    size = guidance.shape[1:]
    if tuple(labels.shape) != size:
        labels = F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0].long()
    return labels.numpy()
