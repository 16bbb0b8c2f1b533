"""Networks of other projects behind our call, as upsamplers to compare with and as teachers."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.vit import IMAGENET
from ...errors import LoftUpError
from .local import ANYUP, JAFAR, Project, load_local

__all__ = ["ForeignUpsampler", "Order", "load_foreign"]

Order = Literal["anyup", "naf", "jafar", "featup", "uplift", "loftup"]
LOCAL: dict[Order, Project] = {"anyup": ANYUP, "jafar": JAFAR}


class ForeignUpsampler(nn.Module):
    """Another project's upsampler behind our call.

    Args:
        network: as torch.hub or its own code gave it.
        order: how it is called:
            "anyup": ``network(image, features, output_size=size)``;
            "naf", "jafar": ``network(image, features, size)``;
            "featup": ``network.upsampler(network.model[1](features), image)``, its channel norm and its stack, 16 times
            the grid, then bilinearly to the size;
            "uplift": ``network(image, features, size)``, after ``network.enable_iterative(4)``;
            "loftup": ``network(features, image)`` with the image at output size.
    """

    def __init__(self, network: nn.Module, order: Order) -> None:
        super().__init__()
        self.network = network
        self.order = order
        self.eval().requires_grad_(False)

    @property
    def code(self) -> str:
        """The source of the network's module."""
        # Not inspect.getfile, which asks for the module: load_local has it forgotten.
        return Path(type(self.network).forward.__code__.co_filename).read_text()

    @torch.no_grad()
    def forward(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and the image (B, 3, H, W) in [0, 1], which these see with ImageNet's mean and deviation."""
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in IMAGENET)
        image = (image - mean) / std
        network: Any = self.network
        if self.order == "anyup":
            dense = network(image, features, output_size=size)
        elif self.order in ("naf", "jafar", "uplift"):
            dense = network(image, features, size)
        elif self.order == "featup":
            dense = network.upsampler(network.model[1](features), image)
        else:
            dense = network(features, F.interpolate(image, size, mode="bilinear", align_corners=False))
        if dense.shape[-2:] != size:
            dense = F.interpolate(dense, size, mode="bilinear", align_corners=False)
        return dense.to(features.dtype)  # type: ignore[no-any-return]


def load_foreign(spec: str, channels: int) -> ForeignUpsampler:
    """Make an upsampler from local files; this runs another project's code.

    Args:
        spec: ``"anyup:WEIGHTS@FOLDER"`` or ``"jafar:WEIGHTS@FOLDER"``.
        channels: of the backbone.

    Raises:
        LoftUpError: there is no such project, or as :func:`loftup.train.baselines.local.load_local`.
    """
    name, _, argument = spec.partition(":")
    for order, project in LOCAL.items():
        if name == order:
            return ForeignUpsampler(load_local(name, argument, project, channels), order)
    raise LoftUpError(
        f"no project {name!r} can be loaded from local files; write NAME:WEIGHTS@FOLDER with NAME one of "
        f"{', '.join(LOCAL)}"
    )
