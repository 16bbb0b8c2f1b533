"""The backbone's features of the enlarged image, or of a part of it, as target on their own grid."""

from torch import Tensor

from ...networks.layers import Box
from ..config import HighResolutionConfig
from ..data.views import Batch
from .distances import distance
from .maps import cut, pool_to

__all__ = ["high_resolution"]


def high_resolution(settings: HighResolutionConfig, dense: Tensor, target: Tensor, batch: Batch, cells: int) -> Tensor:
    """The distance on what both the window and the enlarged region show, in whole cells of the student's features.

    Args:
        settings: of the term.
        dense: (B, C, ...), the batch's window of the output.
        target: (B, C, ...), features of ``batch.large``, normalised.
        batch: with a region.
        cells: along a side of the student's features.
    """
    assert batch.region is not None
    factor, region = batch.factor, batch.region
    pixels = batch.guidance.shape[-1] // cells  # of the output in a cell
    window = batch.window or (0, 0, cells * pixels, cells * pixels)
    common = (
        *(max(window[edge] // pixels, -(-region[edge] // factor)) for edge in (0, 1)),
        *(min(window[edge] // pixels, region[edge] // factor) for edge in (2, 3)),
    )

    def within(outer: Box, unit: int) -> Box:
        top, left, bottom, right = (unit * edge - outer[index % 2] for index, edge in enumerate(common))
        return top, left, bottom, right

    student, target = cut(dense, within(window, pixels)), cut(target, within(region, factor))
    return distance(pool_to(student, (target.shape[-2], target.shape[-1])), target, settings.distance)
