"""The backbone and the upsamplers that a command's options name, and a picture run through them."""

import argparse
import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone, load_backbone
from ..model import LoftUp
from ..pictures import scaled, usual_size
from ..upsampled import Upsampled
from ..weights.catalogue import ANY, TINY, TINY_BACKBONES
from ..weights.hub import UnreachableError

__all__ = [
    "backbone_of",
    "check_backbone",
    "choose_device",
    "load_models",
    "picture_inputs",
    "result_size",
    "upsample_picture",
]


def load_models(arguments: argparse.Namespace, weights: str = "") -> tuple[Backbone, LoftUp]:
    """Backbone and upsampler on the device, checked against each other; without ``weights`` those of the options."""
    choose_device(arguments)
    check_backbone(arguments)
    try:
        up = _upsampler(arguments, weights or arguments.weights or arguments.backbone)
    except UnreachableError as error:
        if arguments.backbone_weights or arguments.backbone in TINY_BACKBONES:
            raise
        too = f"The backbone's weights are needed too{_repository(arguments.backbone)}"
        alone = f"without any network: --backbone {TINY} --weights {ANY}, or loftup demo"
        raise UnreachableError(f"{error}. {too}: give both --weights and --backbone-weights; {alone}") from error
    backbone = backbone_of(arguments)
    with _warnings_as_lines(arguments):
        Upsampled(backbone, up)  # refuses a pair that does not fit, before any work
    return backbone, up


def _upsampler(arguments: argparse.Namespace, name: str) -> LoftUp:
    """The upsampler of that name."""
    dtype = getattr(torch, arguments.dtype)
    with _warnings_as_lines(arguments):
        return LoftUp.from_pretrained(name, device=arguments.device, dtype=dtype, strict=arguments.strict)


@contextlib.contextmanager
def _warnings_as_lines(arguments: argparse.Namespace) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        text = " ".join(str(warning.message).split()).replace("strict=True", "--strict")
        print(f"loftup {arguments.command}: {text}", file=sys.stderr)


def backbone_of(arguments: argparse.Namespace) -> Backbone:
    """The backbone that the options name, on the device."""
    check_backbone(arguments)
    backbone = load_backbone(
        arguments.backbone,
        weights=arguments.backbone_weights,
        layer=arguments.layer,
        mean=tuple(arguments.mean) if arguments.mean else None,
        std=tuple(arguments.std) if arguments.std else None,
        views=arguments.views,
        **dict(arguments.option),
    )
    return backbone.eval().to(arguments.device)


def check_backbone(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a name that is no backbone's, or an ``--option`` that is not for the backbone's library."""
    from ..backbones.load import find

    if arguments.backbone not in TINY_BACKBONES:
        find(arguments.backbone)
    own = inspect.signature(load_backbone).parameters
    for name, value in arguments.option:
        if name in own and own[name].kind is not inspect.Parameter.VAR_KEYWORD:
            option = {"name": "backbone", "weights": "backbone-weights"}.get(name, name)
            known = hasattr(arguments, option.replace("-", "_"))
            remedy = f"give it as --{option}" if known else "leave it out"
            raise ValueError(f"--option {name}={value} is no option of timm's but of loftup's own; {remedy}")


def choose_device(arguments: argparse.Namespace) -> None:
    """Set the device where none is asked for, and say so if it is a GPU; ValueError if torch cannot use it here."""
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.device == "cuda":
            name = torch.cuda.get_device_name()
            print(f"loftup {arguments.command}: on the GPU ({name}); --device cpu for the CPU", file=sys.stderr)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        expected = "expected cpu, cuda, cuda:1 or another device that torch has here"
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use the device {arguments.device!r}: {reason}; {expected}") from error


def _repository(backbone: str) -> str:
    """Where timm would fetch a backbone from, for the message."""
    import timm

    from ..backbones.load import find

    library, name, _ = find(backbone)
    config = timm.get_pretrained_cfg(name) if library == "timm" else None
    return f", from the Hub repository {config.hf_hub_id!r}" if config and config.hf_hub_id else ""


def result_size(arguments: argparse.Namespace, height: int, width: int) -> tuple[int, int]:
    """(H', W') of the upsampled features of a picture of a size."""
    return tuple(arguments.size) if arguments.size else usual_size(height, width)


def upsample_picture(
    arguments: argparse.Namespace, backbone: Backbone, up: LoftUp, image: Any
) -> tuple[Tensor, Tensor]:
    """Features of a PIL image or path, (1, C, h, w), and upsampled, (1, C, H, W)."""
    features, large, size = picture_inputs(arguments, backbone, image)
    with torch.inference_mode():
        return features, up(features, large, size=size)


def picture_inputs(
    arguments: argparse.Namespace, backbone: Backbone, image: Any
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The inputs of an upsampler for a PIL image or path: features (1, C, h, w), image, and size of the map."""
    large = backbone.preprocess(image)
    height, width = large.shape[-2:]
    small = backbone.preprocess(image, size=scaled(height, width, arguments.input / min(height, width)))
    with torch.inference_mode():
        features = backbone(small.to(arguments.device))
    return features, large.to(arguments.device), result_size(arguments, height, width)
