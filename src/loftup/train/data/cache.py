"""The frozen backbone's features on disk, so that it runs once for every fixed view."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import LoftUpError, translate
from ...files import write_atomically
from ..config import TrainConfig

__all__ = ["FeatureCache", "digest_of", "fingerprint", "open_caches"]

log = logging.getLogger("loftup")


class FeatureCache:
    """Features by the pixels that they were made of: an entry can be damaged or missing, but not stale.

    Args:
        folder: made where needed; of one backbone, see :func:`open_caches`.
    """

    def __init__(self, folder: "str | Path") -> None:
        self.folder = Path(folder).expanduser()

    def key(self, image: Tensor) -> str:
        """The key of an image (3, S, S): a digest of its values and shape."""
        content = image.contiguous().numpy().tobytes()
        return hashlib.blake2b(content, digest_size=20, key=repr(tuple(image.shape)).encode()).hexdigest()

    def read(self, key: str) -> Tensor | None:
        """The features (C, h, w) of a key; None where there are none, or damaged ones, which is said.

        Raises:
            LoftUpError: the file is there and cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(key)
        try:
            return load(path.read_bytes())["features"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LoftUpError(
                f"cannot read features from {path}: {error.strerror}; let the file be read, remove it, or leave "
                "data.cache out"
            ) from error
        except (SafetensorError, KeyError) as error:
            log.warning("%s is damaged (%s); its features are computed anew", path, error)
            return None

    def write(self, key: str, features: Tensor) -> None:
        """Keep the features (C, h, w) of a key, whole or not at all.

        Raises:
            LoftUpError: the disk is full, or the folder cannot be written to.
        """
        from safetensors.torch import save

        path = self._path(key)
        remedy = "make room, or leave data.cache out"
        with translate(OSError, lambda error: f"cannot write features to {path}: {error.strerror}; {remedy}"):
            write_atomically(path, save({"features": features.cpu().contiguous()}))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_caches(config: TrainConfig, backbones: Sequence[Backbone]) -> list[FeatureCache]:
    """The caches that a run asks for, each in a folder of its backbone's own; empty if it asks for none."""
    if config.data.cache is None:
        return []
    return [
        FeatureCache(Path(config.data.cache) / fingerprint(backbone, section.options, config.precision))
        for backbone, section in zip(backbones, config.sections.values(), strict=True)
    ]


def fingerprint(backbone: Backbone, *settings: object) -> str:
    """A digest of all that a backbone's features depend on: its weights, layer, scaling, views and further settings."""
    identity = (backbone.name, backbone.layer, backbone.patch_size, backbone.mean, backbone.std, *settings)
    if backbone.views > 1:  # entries of one view keep the names that they have had
        identity = (*identity, f"views={backbone.views}")
    return digest_of(backbone, *identity)


def digest_of(module: nn.Module, *identity: object) -> str:
    """A digest of a module's weights and of what else is given."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=10)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
