"""Which weights a backbone gets, and where those for any backbone stand in for missing ones."""

import os
import warnings
from pathlib import Path

from torch import nn

from ..errors import LoftUpError
from .bundled import ANY, BUNDLED
from .catalogue import PUBLISHED, find_checkpoint

__all__ = ["any_for", "looks_like_path", "name_of", "no_weights_for", "stands_in"]


def name_of(backbone: nn.Module, strict: bool) -> str:
    """The name of the weights for a backbone object."""
    from ..backbones import identify, wrap

    name: str | None = identify(backbone)
    if name is not None and (find_checkpoint(name) or name in BUNDLED):
        return name
    found = f"named {name!r}" if name else f"a {type(backbone).__name__} without a recognised name"
    try:
        wrap(backbone)
    except LoftUpError:
        strict = True  # no backbone that anything could be for
    return any_for(found, strict, stacklevel=5)


def no_weights_for(found: str) -> LoftUpError:
    """What refuses a backbone without weights of its own."""
    return LoftUpError(
        f"no published LoftUp weights for this backbone ({found}); there are weights for {', '.join(PUBLISHED)}. "
        "If it is one of these under another name, pass that name; for weights of your own, pass their path; "
        f"{ANY!r} is an upsampler for features of any backbone"
    )


def any_for(found: str, strict: bool, stacklevel: int) -> str:
    """Let the weights for any backbone stand in, with a warning; ``strict`` refuses."""
    if strict:
        raise no_weights_for(found)
    warnings.warn(
        f"no LoftUp weights of its own for this backbone ({found}): using {ANY!r}, which takes features of any "
        "backbone. strict=True refuses instead; to train weights for this one, see `loftup train --help`",
        UserWarning,
        stacklevel=stacklevel,
    )
    return ANY


def stands_in(name: str) -> bool:
    """Whether "any" stands in for the weights of that name: that of a timm model without any, not of a file here."""
    if name in BUNDLED or find_checkpoint(name):
        return False
    if name.startswith(("hf-hub:", "hf_hub:")):
        return True
    bare = name.removeprefix("timm/")
    if "/" in bare or looks_like_path(name) or Path(name).exists():
        return False
    import timm

    architecture, _, tag = bare.partition(".")
    # A tag that timm does not know is a misspelt one, or of a version of timm that is not here.
    return bool(timm.is_model(architecture)) and (not tag or bare in timm.list_pretrained(f"{architecture}.*"))


def looks_like_path(name: str) -> bool:
    """Whether a string can only be meant as a file or folder."""
    suffixes = (".bin", ".safetensors", ".pt", ".pth", ".ckpt")
    return name.endswith(suffixes) or name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1
