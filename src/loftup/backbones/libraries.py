"""Backbones by the names of transformers and open_clip."""

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LoftUpError, one_line
from ..weights.hub import cache_alone_if_unreachable
from .vit import IMAGENET, Scaling

__all__ = ["build_open_clip", "build_transformers", "is_transformers"]


def is_transformers(name: str) -> bool:
    """Tell whether a name is a repository id, or a folder that transformers wrote."""
    if (Path(name).expanduser() / "config.json").is_file():
        return True
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "hf-hub:", "hf_hub:", "timm/"))


def build_transformers(name: str, weights: Any, options: dict[str, Any]) -> tuple[nn.Module, Scaling]:
    """A model of ``transformers.AutoModel``, and mean and std of its images.

    Args:
        name: repository id or folder.
        weights: None for the repository's, False for random ones.
        options: refused, they are timm's.

    Raises:
        LoftUpError: transformers is not installed, or has no such model.
    """
    _refuse(name, "transformers", weights, options)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise LoftUpError(f"{name!r} is a transformers model: pip install transformers") from error
    source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    local = source != name or Path(source).exists()
    hub = contextlib.nullcontext() if local else cache_alone_if_unreachable(name)
    with hub:
        return _from_transformers(name, source, weights is not False)


def _from_transformers(name: str, source: str, pretrained: bool) -> tuple[nn.Module, Scaling]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        if not pretrained:
            model = AutoModel.from_config(AutoConfig.from_pretrained(source))  # type: ignore[no-untyped-call]
        else:
            model = AutoModel.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise LoftUpError(f"transformers has no model {name!r}: {one_line(error)[:300]}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
        mean, std = (tuple(map(float, getattr(processor, f"image_{key}"))) for key in ("mean", "std"))
    except (OSError, ValueError, AttributeError, TypeError):
        mean, std = IMAGENET  # a folder with a model alone
    return model, (mean, std)  # type: ignore[return-value]


def build_open_clip(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    """A model of open_clip, which notes the scaling of its images itself.

    Args:
        name: "MODEL/TAG", or "MODEL" with ``weights``.
        weights: None for the tag's, False for random ones, or a path.
        options: refused, they are timm's.

    Raises:
        LoftUpError: no tag where one is needed, an unknown one, or weights that cannot be had.
    """
    import open_clip

    _refuse(name, "open_clip", None, options)
    kind, _, tag = name.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(kind)
    if weights is None and tag not in tags:
        got = f"no tag {tag!r}" if tag else "no tag for the weights"
        raise LoftUpError(f"open_clip's {kind!r} has {got}; give one of {', '.join(f'{kind}/{each}' for each in tags)}")
    pretrained = {} if weights is False else {"pretrained": tag if weights is None else os.fspath(weights)}
    # Weights of OpenAI's and some others learned with it, whatever the model's name says.
    quick = bool((open_clip.get_pretrained_cfg(kind, tag) or {}).get("quick_gelu")) if tag in tags else False
    try:
        return open_clip.create_model(  # type: ignore[no-any-return]
            kind, load_weights=weights is not False, force_quick_gelu=quick, **pretrained
        )
    except Exception as error:  # the Hub's, pickle's and torch's
        raise LoftUpError(f"open_clip cannot build {name!r}: {one_line(error)[:300]}") from error


def _refuse(name: str, library: str, weights: Any, options: dict[str, Any]) -> None:
    if weights not in (None, False):
        raise LoftUpError(f"{name!r} is a model of {library}: weights= takes None or False here; give a folder as name")
    if options:
        raise LoftUpError(f"{name!r} is a model of {library}, which takes no options of timm: {', '.join(options)}")
