"""Stage 2: a teacher sees crops of the enlarged image, and the student the whole one (paper section 3.2, Eq. 3)."""

import torch
from torch import Tensor

from ...model import LoftUp
from ..config import SelfDistillationConfig
from ..data.views import Batch
from .distances import distance
from .maps import crop_border, pool_to
from .mask_bicubic import mask_refine
from .student import Extractor, Output

__all__ = ["follow", "self_distillation"]


def self_distillation(
    settings: SelfDistillationConfig, teacher: LoftUp, output: Output, batch: Batch, see: Extractor
) -> Tensor:
    """The mean distance of the student's output to the teacher's over the crops."""
    losses = []
    for crop in batch.crops:
        top, left, bottom, right = crop.box
        with torch.no_grad():
            target = teacher(see(crop.image), crop.image)
            if settings.refine:
                target = mask_refine(target, crop.masks, settings.alpha, settings.masks)
            target = pool_to(target, (bottom - top, right - left))
        student = output.at(crop.box)
        student, target = (crop_border(x, settings.border) for x in (student, target))
        losses.append(distance(student, target, settings.distance))
    return torch.stack(losses).mean()


@torch.no_grad()
def follow(teacher: LoftUp, student: LoftUp, decay: float) -> None:
    """Move the teacher towards the student, with the running statistics, which belong to the weights."""
    for theirs, ours in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        if theirs.is_floating_point():
            theirs.lerp_(ours, 1 - decay)
        else:
            theirs.copy_(ours)
