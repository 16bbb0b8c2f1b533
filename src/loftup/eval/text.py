"""Embeddings of class names, and the CLIP that they are compared in."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from ..backbones import Backbone, wrap
from ..errors import LoftUpError, translate
from ..files import stamp, write_atomically
from ..weights.hub import cache_alone_if_unreachable

__all__ = ["Clip", "OpenClip", "embed", "templates"]


class Clip(Protocol):
    """A CLIP with dense features in the space of its texts."""

    @property
    def name(self) -> str:
        """Tells the weights, for the cache of text embeddings."""

    def dense(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to features (B, D, h, w)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings (len(texts), D)."""


class OpenClip:
    """A CLIP of open_clip; dense features in the space of its texts, see :func:`loftup.wrap`.

    Args:
        name: "MODEL/PRETRAINED" as open_clip names them, "ViT-B-16/openai" for example.
        device: to compute on.

    Raises:
        LoftUpError: open_clip is missing or does not know the name, or the weights cannot be fetched.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        with translate(ImportError, 'texts need open_clip: pip install "loftup[text]"'):
            import open_clip
        model, _, pretrained = name.partition("/")
        if not pretrained:
            raise LoftUpError(f"expected a CLIP as MODEL/PRETRAINED, got {name!r}; write ViT-B-16/openai")
        try:
            quick = pretrained == "openai"
            hub = contextlib.nullcontext() if os.path.exists(pretrained) else cache_alone_if_unreachable(name)
            with hub:
                self.model: Any = open_clip.create_model(model, pretrained=pretrained, force_quick_gelu=quick)
                self._tokenize = open_clip.get_tokenizer(model)
        except Exception as error:  # the Hub's client and open_clip raise many kinds
            raise LoftUpError(f"cannot load the CLIP {name!r} of open_clip: {error}") from error
        self.model.eval().to(device)
        self.name = f"{name} {stamp(Path(pretrained))}" if os.path.isfile(pretrained) else name
        self.device = device
        self.backbone: Backbone = wrap(self.model, space="text")

    @torch.no_grad()
    def dense(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D, h, w)."""
        return self.backbone(self.backbone.normalise(image))  # type: ignore[no-any-return]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D)."""
        return self.model.encode_text(self._tokenize(list(texts)).to(self.device))  # type: ignore[no-any-return]


def templates() -> list[str]:
    """Sentences with a {} for the class name, whose embeddings are averaged."""
    return json.loads((Path(__file__).parent / "templates.json").read_text("utf-8"))  # type: ignore[no-any-return]


def embed(clip: Clip, classes: Sequence[str], sentences: Sequence[str], cache: Path | None = None) -> Tensor:
    """Unit vectors (K, D) of class names: means over the sentences of the unit embeddings, kept on disk.

    Args:
        clip: whose text tower to use.
        classes: names; several names of one class are separated by commas, and averaged.
        sentences: with a {} for the name.
        cache: folder to keep the vectors in; None means ``$LOFTUP_CACHE``, or ``~/.cache/loftup``.

    Raises:
        ValueError: there are no sentences, or one has no {}.
    """
    if not sentences or not all("{}" in sentence for sentence in sentences):
        raise ValueError(f"expected sentences with a {{}} for the class name, got {list(sentences)}")
    folder = cache or Path(os.environ.get("LOFTUP_CACHE", "~/.cache/loftup")).expanduser()
    key = hashlib.sha256(json.dumps([clip.name, list(classes), list(sentences)]).encode()).hexdigest()[:16]
    file = folder / "texts" / f"{key}.safetensors"
    if file.is_file():
        return load_file(file)["vectors"]
    vectors = []
    for name in classes:
        texts = [sentence.format(synonym.strip()) for synonym in name.split(",") for sentence in sentences]
        vectors.append(F.normalize(F.normalize(clip.texts(texts).float(), dim=-1).mean(0), dim=0).cpu())
    result = torch.stack(vectors)
    write_atomically(file, save({"vectors": result}))
    return result
