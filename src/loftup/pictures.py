"""Reading pictures: any file and any mode that Pillow knows, upright and in RGB."""

import contextlib
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LoftUpError, translate
from .files import MADE_BY, check_regular

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "check_suffix",
    "encode",
    "open_picture",
    "picture_size",
    "require_pillow",
    "scaled",
    "to_rgb",
    "usual_size",
]

LONGEST = 512  # pixels of the longer side of a result whose size is not asked for
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def open_picture(path: "str | os.PathLike[str] | BytesIO", name: str = "") -> "Image.Image":
    """Read a picture, or the bytes of its file, as :func:`to_rgb` gives it; ``name`` is what errors call it.

    Raises:
        OSError: the file cannot be read as a picture: missing, truncated, a pipe, of no known format, or too large for
            Pillow.
        LoftUpError: see :func:`to_rgb`.
    """
    with _opened(path, name) as picture:
        picture.load()
        return to_rgb(picture, _name(path, name))


def picture_size(path: "str | os.PathLike[str]") -> tuple[int, int]:
    """(H, W) of a picture as :func:`open_picture` gives it, from its header alone; OSError if it has none."""
    with _opened(path) as picture:
        width, height = picture.size
        # A PNG would be decoded to look for what its header does not hold.
        exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
        turned = exif.get(0x0112, 1) >= 5  # on its side
    return (width, height) if turned else (height, width)


@contextlib.contextmanager
def _opened(path: "str | os.PathLike[str] | BytesIO", name: str = "") -> "Iterator[Image.Image]":
    """Open a picture, with whatever goes wrong as an OSError that names it."""
    pil = require_pillow()
    try:
        if not isinstance(path, BytesIO):
            check_regular(path)
        with pil.open(path) as picture:
            yield picture
    except (FileNotFoundError, LoftUpError):
        raise
    except Exception as error:  # a damaged file raises SyntaxError, struct.error, DecompressionBombError and others
        reason = str(error).replace(f" {path!r}", "")  # Pillow's names an object in memory
        raise OSError(f"cannot read the image {_name(path, name)}: {reason}") from error


def _name(path: "str | os.PathLike[str] | BytesIO", name: str) -> str:
    return name or ("of these bytes" if isinstance(path, BytesIO) else os.fspath(path))


def to_rgb(picture: "Image.Image", name: str = "the picture") -> "Image.Image":
    """Turn a PIL image upright as EXIF says and make it RGB, 8 bits a channel; 16-bit grey is scaled by 1 / 257.

    Raises:
        LoftUpError: the values have no known range (modes I and F).
    """
    from PIL import ImageOps

    # Before version 11 Pillow opened 16-bit PNGs in mode I.
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode in ("I", "F") and not sixteen:
        raise LoftUpError(
            f"{name} has mode {picture.mode!r}, whose values have no fixed range; expected 8 or 16 bits a channel: "
            'scale the values to 0..255 and .convert("L")'
        )
    upright = ImageOps.exif_transpose(picture)
    if sixteen:
        # Pillow's own conversions clip at 255; what it stores again it cuts off, hence the half.
        upright = upright.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    return upright.convert("RGB")


def encode(picture: "Image.Image", kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file, marked as made by loftup where it can be; ``options`` are Pillow's."""
    stream, exif = BytesIO(), require_pillow().Exif()
    exif[0x0131] = MADE_BY  # Software
    picture.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) times a scale, rounded, at least 1 each."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def usual_size(height: int, width: int) -> tuple[int, int]:
    """(H', W') of a result for a picture where none is asked for: the picture's, its longer side at most LONGEST."""
    return scaled(height, width, min(1.0, LONGEST / max(height, width)))


def check_suffix(path: Path) -> str:
    """The format that Pillow writes under that name, or ValueError if it writes none."""
    pil = require_pillow()
    kind = pil.registered_extensions().get(path.suffix.lower())
    if kind not in pil.SAVE:
        raise ValueError(
            f"cannot write a picture named {path.name!r}: expected a suffix such as .png, .jpg or .webp, "
            f"got {path.suffix!r}"
        )
    return str(kind)


def require_pillow() -> Any:
    """The module ``PIL.Image``, or a LoftUpError that names the extra."""
    with translate(ImportError, 'pictures need Pillow: pip install "loftup[viz]"'):
        from PIL import Image
    return Image
