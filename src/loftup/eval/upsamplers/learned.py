"""Learned upsamplers by name: trained with ``loftup train``, LoftUp itself among them."""

from ...backbones import Backbone
from ...errors import LoftUpError
from ...model import LoftUp
from ...upsampled import Upsampled
from .base import LearnedConfig, LearnedUpsampler
from .jbu import FeatUpJBU
from .lift import LiFT
from .liif import LIIF
from .registry import Upsampler, register
from .resize_conv import ResizeConv

__all__ = ["ARCHITECTURES", "build", "card"]

ARCHITECTURES: dict[str, type[LearnedUpsampler]] = {
    kind.architecture: kind for kind in (FeatUpJBU, LiFT, ResizeConv, LIIF)
}


def build(config: LearnedConfig) -> LearnedUpsampler:
    """A network with its first weights.

    Raises:
        LoftUpError: there is no such architecture.
    """
    if config.architecture not in ARCHITECTURES:
        raise LoftUpError(
            f"there is no architecture {config.architecture!r}; expected loftup, {', '.join(ARCHITECTURES)}"
        )
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


def _load(name: str) -> None:
    @register(name)
    def factory(backbone: Backbone, argument: str) -> Upsampler:
        if not argument:
            raise LoftUpError(
                f"the upsampler {name!r} needs its weights: write {name}:FOLDER, the output of `loftup train quick_cpu "
                f"model.architecture={name} ...`"
            )
        up = ARCHITECTURES[name].from_pretrained(argument)
        if up.config.channels != backbone.channels:
            raise LoftUpError(
                f"{argument} was trained for {up.config.channels} channels, {backbone.name or 'the backbone'} has "
                f"{backbone.channels}; train one for this backbone"
            )
        return up.requires_grad_(False)


for _name in ARCHITECTURES:
    _load(_name)


@register("loftup")
def _loftup(backbone: Backbone, argument: str) -> Upsampler:
    # A stand-in must not be judged under another name: "loftup:any" says what it is.
    up = LoftUp.from_pretrained(argument or backbone, strict=not argument)
    Upsampled(backbone, up)  # refuses a pair that does not fit
    return up.requires_grad_(False)
