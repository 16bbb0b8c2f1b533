"""The learned upsamplers that LoftUp is compared with, by the names of their architectures."""

from ...errors import LoftUpError
from .base import LearnedConfig, LearnedUpsampler
from .jbu import FeatUpJBU
from .lift import LiFT
from .liif import LIIF
from .resize_conv import ResizeConv

__all__ = ["ARCHITECTURES", "LearnedConfig", "LearnedUpsampler", "build", "card"]

KINDS: tuple[type[LearnedUpsampler], ...] = (FeatUpJBU, LiFT, ResizeConv, LIIF)
ARCHITECTURES = {kind.architecture: kind for kind in KINDS}


def build(config: LearnedConfig) -> LearnedUpsampler:
    """A network with its first weights.

    Raises:
        LoftUpError: there is no such architecture.
    """
    if config.architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise LoftUpError(f"there is no architecture {config.architecture!r}; expected loftup, {names}")
    return ARCHITECTURES[config.architecture](config)


def card(config: LearnedConfig, source: str) -> str:
    """Model card of a trained network."""
    backbone = config.backbone or "a vision backbone"
    return f"""---
library_name: loftup
pipeline_tag: image-feature-extraction
tags: [feature-upsampling, loftup]
---

# {config.architecture} for {backbone}

Upsamples features of {backbone} (C = {config.channels}) to any resolution; one of the upsamplers that loftup compares.

```python
from loftup.eval.upsamplers import create

up = create("{config.architecture}:{source}", backbone)

# (B, {config.channels}, h, w) and (B, 3, H, W) in [0, 1] to (B, {config.channels}, H, W)
features = up(low_resolution, image, (H, W))
```
"""
