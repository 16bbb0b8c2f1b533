"""The student's output for a batch, whole or on windows of its pixels, with gradients."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...model import LoftUp
from ...networks.layers import Box
from ..data.views import Batch
from .maps import cut

__all__ = ["Extractor", "Output", "upsample_window"]

Extractor = Callable[[Tensor], Tensor]  # an image in [0, 1] to the features of the step's backbone, on the terms' scale


def upsample_window(
    up: LoftUp, normalised: Tensor, guidance: Tensor, box: Box | None, values: Tensor | None = None
) -> Tensor:
    """A window of ``up``'s output, equal to cutting it out of the whole map, at the cost of the window.

    With the published network exact where the batch norms use their running statistics, see
    :func:`loftup.train.objective.start.freeze_batch_norm`.

    Args:
        up: the module; the universal one looks at the whole image.
        normalised: (B, C, h, w), features behind the channel norm, in ``up``'s dtype.
        guidance: (B, 3, H, W), the whole image at output size.
        box: (top, left, bottom, right) of the window; None means everything.
        values: (B, E, h, w), for the universal one, what to average in place of the features.

    Returns:
        (B, C, bottom - top, right - left), or with E channels.

    Raises:
        ValueError: the box is empty or reaches beyond the image.
    """
    if not isinstance(up, LoftUp):  # a network that LoftUp is compared with
        return up.window(normalised, guidance, box)
    height, width = guidance.shape[-2:]
    top, left, bottom, right = box or (0, 0, height, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"window {box} does not lie in an image of {height}x{width}")
    options = {} if values is None else {"values": values}
    return up.upsampler(  # type: ignore[no-any-return]
        normalised, guidance, box, checkpointing=up.activation_checkpointing, **options
    )


class Output:
    """The student's output for a batch, computed where it is asked for.

    With ``whole`` everything is cut out of the whole map: batch statistics of a part would be others. ``beside``, with
    the universal network, holds further values by name, (B, E, h, w) each, that are averaged in the same pass; alone,
    unless ``dense`` says that the features' own average is asked for too.
    """

    def __init__(
        self,
        up: LoftUp,
        normalised: Tensor,
        batch: Batch,
        *,
        whole: bool,
        beside: Mapping[str, Tensor] | None = None,
        dense: bool = True,
    ) -> None:
        self.up, self.normalised, self.batch, self.whole = up, normalised, batch, whole
        self._values = dict(beside or {})
        if dense or not self._values:
            self._values = {"dense": normalised} | self._values

    @functools.cached_property
    def windows(self) -> dict[str, Tensor]:
        """The batch's window of what is averaged, by names, in the dtype of the targets."""
        values = list(self._values.values())
        features_alone = self._values.keys() == {"dense"}
        window = self._window(self.batch.window, None if features_alone else torch.cat(values, 1))
        return dict(zip(self._values, window.split([x.shape[1] for x in values], 1), strict=True))

    @property
    def dense(self) -> Tensor:
        """The window of the features."""
        return self.windows["dense"]

    def at(self, box: Box) -> Tensor:
        """Any box, given in pixels of the whole output."""
        if self.batch.window is None and (self.whole or "windows" in self.__dict__):
            return cut(self.dense, box)
        return self._window(box)

    def _window(self, box: Box | None, values: Tensor | None = None) -> Tensor:
        # Autocast may have made it half precision.
        return upsample_window(self.up, self.normalised, self.batch.guidance, box, values).to(self.normalised.dtype)
