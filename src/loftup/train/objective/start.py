"""Where training starts: the batch norms' statistics, and weights that interpolate before they have learned."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...model import LoftUp
from ...networks.config import LoftUpConfig
from ...networks.layers import FourierCode

__all__ = ["calibrate_batch_norm", "freeze_batch_norm", "start_as_interpolator"]


@torch.no_grad()
def calibrate_batch_norm(up: LoftUp, images: Iterable[Tensor]) -> None:
    """Set the stem's running statistics to those of whole images.

    Args:
        up: the module; its norms' modes stay as they are.
        images: batches (B, 3, H, W) of guidance, on the module's device; their statistics are averaged with equal
            weights.

    Raises:
        ValueError: there are no images.
    """
    network: Any = up.upsampler
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    modes = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    count = 0
    try:
        for image in images:
            network.queries(image)
            count += 1
    finally:
        for norm, (training, momentum) in zip(norms, modes, strict=True):
            norm.train(training)
            norm.momentum = momentum
    if not count:
        raise ValueError("no images to take statistics of; expected at least one batch (B, 3, H, W)")


def freeze_batch_norm(up: LoftUp) -> None:
    """Let the stem's batch norms use their running statistics from now on, in training too.

    Training on windows needs this: the statistics of a window hold the mean of its position code, so that batch
    statistics would take away from every query where it is, and the network at work would be another one than the
    network that was trained.
    """
    for module in up.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def start_as_interpolator(up: LoftUp, grid: int = 20, sharpness: float = 0.42) -> None:
    """Set the weights so that the output is the normalised features, interpolated smoothly: a start to learn from.

    From random weights the network must first learn that position decides which tokens a pixel attends to and that
    the tokens' features are the answer; a short training does not get far beyond. Here both are put in by hand, within
    the published architecture: the stem passes a sine and a cosine of the pixel's row and column on in the residual
    stream's 4 * feature_frequencies spare channels, each head compares them with the tokens' position code at the
    frequency e and copies its share of the channels; the second and later blocks and the feed-forward layers start at
    zero. All weights stay trainable, and those that do not matter at the start are random.

    Args:
        up: a module on the CPU with ``position_code="sine"``, at least 2 frequencies, and heads of width 4 or more.
        grid: number of feature cells along a side for which the interpolation is made, at least 2; others come out
            somewhat smoother (finer grids) or sharper (coarser ones), and shifted by part of a cell near the borders,
            because pixels are placed by grid / (grid - 1).
        sharpness: standard deviation of the interpolation's bell in cells of such a grid.

    Raises:
        ValueError: the module is another one, or the grid too small.
    """
    config = up.config
    if not isinstance(config, LoftUpConfig):
        raise ValueError("start_as_interpolator is for the published network, got the one behind 'any'")
    if config.position_code != "sine" or config.feature_frequencies < 2 or config.image_frequencies < 2:
        raise ValueError(
            "start_as_interpolator needs position_code='sine' with at least 2 frequencies, got "
            f"{config.position_code!r} with {config.feature_frequencies} and {config.image_frequencies}"
        )
    if config.width // config.heads < 4:
        raise ValueError(
            f"start_as_interpolator needs heads of width 4 or more, got width {config.width} with {config.heads} heads"
        )
    if grid < 2:
        raise ValueError(f"grid is {grid}, expected at least 2 cells along a side")
    network: Any = up.upsampler
    stem, code, positions, channels = network.first_conv, network.fourier_feat[1], network.lr_pe, config.channels
    code.biases[:, :2] = 0
    positions.biases.zero_()
    token_frequencies = positions.frequencies
    # The token frequency whose wave is longer than the picture and shortest among those: unambiguous and sharp.
    octave = int((token_frequencies < math.pi).nonzero().max())
    frequency = float(token_frequencies[octave])

    # Pixels reach beyond the outermost cells' centres: their coordinate, in the cells' scale, is larger.
    signals, offsets = _read_out(network, frequency * grid / (grid - 1))
    both = torch.stack([signals, -signals], 1).flatten(0, 1)  # (8, code): ReLU keeps one sign of each

    carriers = slice(channels, channels + 8)
    stem.conv1.weight[carriers] = 0
    stem.conv1.weight[carriers, :, 1, 1] = both
    stem.conv1.bias[carriers] = torch.stack([offsets, -offsets], 1).flatten()
    stem.conv2.weight[carriers] = 0
    stem.conv2.weight[carriers, carriers, 1, 1] = torch.eye(8)
    stem.conv2.bias[carriers] = 0
    for norm in (stem.batch_norm1, stem.batch_norm2):
        norm.reset_running_stats()
        norm.reset_parameters()
    stem.batch_norm2.weight[:] = 0.05  # the rest of the stem whispers at first
    stem.batch_norm2.weight[carriers] = 1

    spacing = 2 / (grid - 1)
    contrast = 1 / (sharpness * frequency * spacing) ** 2
    width, heads = config.width, config.heads
    per_head = width // heads
    # Query and key signals as the norms leave them: rms of the 8 carriers alone, and of features plus code.
    query_scale = math.sqrt(2 / width)
    key_scale = math.sqrt((channels + 2 * config.feature_frequencies) / width)
    gain = math.sqrt(contrast * math.sqrt(per_head))
    # Sine and cosine of the row, then of the column.
    sines = channels + 2 * octave + torch.arange(2)
    key_rows = torch.stack([sines, sines + 2 * config.feature_frequencies], 1).flatten()
    for index, block in enumerate(network.ca_transformer.layers):
        attention, feed_forward = block[0].attention, block[1]
        projection = attention.in_proj_weight
        for head in range(heads):
            rows = torch.arange(head * per_head, head * per_head + 4)
            for row, signal, key in zip(rows, range(4), key_rows, strict=True):
                projection[row] = 0
                projection[row, channels + 2 * signal] = gain * query_scale
                projection[row, channels + 2 * signal + 1] = -gain * query_scale
                projection[width + row] = 0
                # The norm takes the tokens' mean off every channel; features have none, so theirs gives it back.
                projection[width + row, :channels] = -gain * key_scale / channels
                projection[width + row, key] = gain * key_scale
        identity = torch.eye(width) * (torch.arange(width) < channels)
        projection[2 * width :] = identity + (1 - identity.diagonal())[:, None] * projection[2 * width :]
        attention.out_proj.weight.copy_(identity if index == 0 else torch.zeros_like(identity))
        attention.out_proj.bias.zero_()
        feed_forward.net[4].weight.zero_()
        feed_forward.net[4].bias.zero_()
    convolution = network.final_conv[0]
    convolution.weight.zero_()
    convolution.weight[:, :, 0, 0].copy_(torch.eye(channels, width))
    convolution.bias.zero_()


def _read_out(network: Any, frequency: float) -> tuple[Tensor, Tensor]:
    """Weights (4, code channels) and offsets (4,) that read a pixel's position off the normalised guidance code.

    They give sin and cos of ``frequency`` times the row, then the column, by ridge regression over random positions
    and colours.
    """
    code, norm = network.fourier_feat[1], network.first_conv.norm
    generator = torch.Generator().manual_seed(0)
    values = 2 * torch.rand(1, 5, 4096, 1, generator=generator) - 1
    values[:, 2:] /= 2
    x = norm(torch.cat([FourierCode.forward(code, values), values[:, 2:]], dim=1))[0, :, :, 0].mT.double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    angles = frequency * values[0, :2, :, 0].double()
    waves = torch.stack([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()], dim=1)
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.mT @ x + ridge, x.mT @ waves).float().mT
    return weights[:, :-1], weights[:, -1]
