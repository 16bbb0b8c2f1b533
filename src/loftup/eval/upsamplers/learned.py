"""Learned upsamplers by name: trained with ``loftup train``, LoftUp itself among them."""

from ...backbones import Backbone
from ...errors import LoftUpError
from ...model import LoftUp
from ...networks.config import UniversalConfig
from ...train.baselines import ARCHITECTURES
from ...upsampled import Upsampled
from .registry import Upsampler, register


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
    up = LoftUp.from_pretrained(argument or backbone, strict=not argument)
    # What serves every backbone must not be judged under another name: "loftup:any" says what it is.
    if not argument and isinstance(up.config, UniversalConfig):
        raise LoftUpError(
            f"there is no LoftUp of its own for {backbone.name}; write loftup:any for the upsampler of every backbone, "
            "or loftup:FOLDER for weights of your own"
        )
    Upsampled(backbone, up)  # refuses a pair that does not fit
    return up.requires_grad_(False)
