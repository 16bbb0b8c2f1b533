"""The network on a window of its output pixels, with gradients."""

from torch import Tensor

from ...model import LoftUp
from ...networks.layers import Box

__all__ = ["upsample_window"]


def upsample_window(
    up: LoftUp, normalised: Tensor, guidance: Tensor, box: Box | None, values: Tensor | None = None
) -> Tensor:
    """A window of ``up``'s output, equal to cutting it out of the whole map, at the cost of the window.

    Pixels are independent behind the stem, whose two 3x3 convolutions see 2 pixels around the window; zero padding
    stays at the image's true border. Exact where the batch norms use their running statistics: in training mode their
    statistics are those of the window, among them the mean of the position code, which no longer tells the position
    (see :func:`loftup.train.objective.start.freeze_batch_norm`).

    Args:
        up: the module; with values="features" the whole image is looked at, and ``activation_checkpointing`` is
            without effect.
        normalised: (B, C, h, w), features behind the channel norm, in ``up``'s dtype.
        guidance: (B, 3, H, W), the whole image at output size.
        box: (top, left, bottom, right) of the window; None means everything.
        values: (B, E, h, w), with values="features" what to average in place of the features.

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
    if values is None:
        return up.upsampler(normalised, guidance, box, checkpointing=up.activation_checkpointing)  # type: ignore[no-any-return]
    return up.upsampler(  # type: ignore[no-any-return]
        normalised, guidance, box, values=values, checkpointing=up.activation_checkpointing
    )
