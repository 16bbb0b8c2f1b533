"""Small pictures for extractions, and settings that make them quick."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

QUICK = {"backbone": "tiny", "weights": "any", "input": 64, "size": (40, 48), "part": 4}


def jpeg(seed: int, height: int = 60, width: int = 80) -> bytes:
    """A smooth picture of its own colours."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + seed % 7) + channel) + np.cos(y / (4 + seed % 5) - channel) for channel in range(3)]
    pixels = (np.stack(waves, -1) * 60 + 128).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def photos(folder: Path, count: int = 10) -> Path:
    """A folder with a subfolder, pictures of two sizes."""
    (folder / "sub").mkdir(parents=True)
    for index in range(count):
        name = f"sub/{index:03d}.jpg" if index % 3 == 0 else f"{index:03d}.jpg"
        (folder / name).write_bytes(jpeg(index, width=80 if index % 2 else 64))
    return folder
