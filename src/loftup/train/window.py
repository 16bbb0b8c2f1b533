"""The network on a window of its output pixels, with gradients."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers import FourierCode, axis_coordinates, run
from ..model import LoftUp
from ..universal import UniversalUpsampler

__all__ = ["Box", "upsample_window"]

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels, the last two excluded


def upsample_window(
    up: LoftUp, normalised: Tensor, guidance: Tensor, box: Box | None, values: Tensor | None = None
) -> Tensor:
    """A window of ``up``'s output, equal to cutting it out of the whole map, at the cost of the window.

    Pixels are independent behind the stem, whose two 3x3 convolutions see 2 pixels around the window; zero padding
    stays at the image's true border. Exact where the batch norms use their running statistics: in training mode their
    statistics are those of the window, among them the mean of the position code, which no longer tells the position
    (see :func:`loftup.train.start.freeze_batch_norm`).

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
    network = up.upsampler
    height, width = guidance.shape[-2:]
    top, left, bottom, right = box or (0, 0, height, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"window {box} does not lie in an image of {height}x{width}")
    if isinstance(network, UniversalUpsampler):
        return network(normalised, guidance, box, values)  # type: ignore[no-any-return]
    if box is None:
        return network(normalised, guidance, up.activation_checkpointing)  # type: ignore[no-any-return]
    checkpointing = up.activation_checkpointing
    # A second pass would update the batch norms' statistics again.
    learning = any(layer.training for layer in network.first_conv if isinstance(layer, nn.BatchNorm2d))
    x = run(checkpointing and not learning, _stem, network, guidance, box, normalised.dtype)
    x = network.ca_transformer(rearrange(x, "b d h w -> b (h w) d"), network.tokens(normalised), checkpointing)
    x = rearrange(x, "b (h w) d -> b d h w", h=bottom - top)
    return network.final_conv(x)  # type: ignore[no-any-return]


def _stem(network: nn.Module, guidance: Tensor, box: Box, dtype: torch.dtype) -> Tensor:
    scale, code = network.fourier_feat  # type: ignore[misc]
    norm, conv1, batch_norm1, relu1, conv2, batch_norm2, relu2 = network.first_conv  # type: ignore[misc]
    height, width = guidance.shape[-2:]
    top, left, bottom, right = box
    # What is missing of the 2-pixel halo at each side (left, right, top, bottom) lies outside the image: zeros.
    missing = [max(0, 2 - left), max(0, right + 2 - width), max(0, 2 - top), max(0, bottom + 2 - height)]
    rows = slice(max(0, top - 2), min(height, bottom + 2))
    columns = slice(max(0, left - 2), min(width, right + 2))
    x = scale(guidance)[:, :, rows, columns]
    coordinates = torch.stack(
        torch.meshgrid(
            axis_coordinates(height, x.device)[rows], axis_coordinates(width, x.device)[columns], indexing="ij"
        )
    )
    values = torch.cat([coordinates.expand(len(x), -1, -1, -1), x], dim=1)
    x = norm(torch.cat([FourierCode.forward(code, values), x], dim=1)).to(dtype)
    x = relu1(batch_norm1(_convolve(conv1, F.pad(x, [min(1, n) for n in missing]))))
    return relu2(batch_norm2(_convolve(conv2, F.pad(x, [max(0, n - 1) for n in missing]))))  # type: ignore[no-any-return]


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias)
