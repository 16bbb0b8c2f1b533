"""The backbone's features of shifted views of the picture, upsampled, as target at every pixel.

Views keep the picture at the scale that the backbone knows, and hold detail from inside its patches: a finer grid in
the features' own space, which an enlarged picture's features leave. See :mod:`loftup.backbones.views`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import LoftUp
from ...networks.layers import Box
from ..config import ShiftedConfig
from ..data.views import Batch
from .distances import distance
from .maps import cut
from .student import upsample_window

__all__ = ["make_teacher", "shifted"]

# Features (B, C, h, w), guidance as in a Batch and a window of it to that window of (B, C, O, O).
Teacher = Callable[[Tensor, Tensor, Box | None], Tensor]


def make_teacher(settings: ShiftedConfig, device: torch.device) -> Teacher:
    """Make what brings the views' grid to the output's size: an upsampler, frozen, or bilinear interpolation."""
    if settings.upsampler is None:
        return lambda features, guidance, window: cut(
            F.interpolate(features, guidance.shape[-2:], mode="bilinear", align_corners=False), window
        )
    up = LoftUp.from_pretrained(settings.upsampler, device=device, dtype=torch.float32).eval().requires_grad_(False)

    def upsample(features: Tensor, guidance: Tensor, window: Box | None) -> Tensor:
        finer = math.isqrt(guidance.shape[1] // 3)
        if finer > up.config.oversampling:  # the student looks at more pixels of the image
            guidance = F.avg_pool2d(F.pixel_shuffle(guidance, finer), finer)
        return upsample_window(up, up.channelnorm(features), guidance, window)

    return upsample


def shifted(settings: ShiftedConfig, dense: Tensor, views: Tensor, batch: Batch, teacher: Teacher) -> Tensor:
    """The distance of the student's output to the teacher's, in the batch's window.

    Args:
        settings: of the term.
        dense: (B, C, ...), the window of the student's output.
        views: (B, C, n * h, n * w), features of the shifted views, on the terms' scale.
        batch: whose guidance the teacher sees.
        teacher: from :func:`make_teacher`.
    """
    with torch.no_grad(), torch.autocast(views.device.type, enabled=False):
        target = teacher(views, batch.guidance, batch.window)
    return distance(dense, target.to(dense.dtype), settings.distance)
