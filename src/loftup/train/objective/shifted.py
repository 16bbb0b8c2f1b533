"""The backbone's features of shifted views of the picture, upsampled, as target at every pixel.

Views keep the picture at the scale that the backbone knows, and hold detail from inside its patches: a finer grid in
the features' own space, which an enlarged picture's features leave. See :mod:`loftup.backbones.views`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import LoftUp
from ..config import ShiftedConfig
from ..data.views import Batch
from .distances import distance
from .maps import cut

__all__ = ["make_teacher", "shifted"]

Teacher = Callable[[Tensor, Tensor], Tensor]  # features (B, C, h, w) and guidance (B, 3, O, O) to (B, C, O, O)


def make_teacher(settings: ShiftedConfig, device: torch.device) -> Teacher:
    """Make what brings the views' grid to the output's size: an upsampler, frozen, or bilinear interpolation."""
    if settings.upsampler is None:
        return lambda features, guidance: F.interpolate(
            features, guidance.shape[-2:], mode="bilinear", align_corners=False
        )
    up: nn.Module = LoftUp.from_pretrained(settings.upsampler, device=device, dtype=torch.float32)
    return up.eval().requires_grad_(False)


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
        target = teacher(views, batch.guidance)
    return distance(dense, cut(target, batch.window).to(dense.dtype), settings.distance)
