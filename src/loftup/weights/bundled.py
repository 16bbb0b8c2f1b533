"""The upsamplers that come with the package: names and folders, data as in :mod:`loftup.weights.catalogue`."""

from pathlib import Path

__all__ = ["ANY", "BUNDLED", "TINY"]

FOLDER = Path(__file__).parent.parent / "bundled"

ANY = "any"  # for every backbone: LoftUpConfig(values="features")
TINY = "tiny"  # for load_backbone("tiny")

BUNDLED = {ANY: FOLDER / "any", TINY: FOLDER / "tiny_loftup"}
