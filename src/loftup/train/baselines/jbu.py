"""FeatUp's stack of learned joint bilateral upsamplers, in plain PyTorch."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Doubling, DoublingUpsampler, LearnedConfig

__all__ = ["FeatUpJBU"]

RADIUS = 3
CHANNELS_AT_ONCE = 32


class _NeighbourDot(torch.autograd.Function):
    """Products of every position's vector with those of its neighbours: (B, K, H + 6, W + 6) to (B, 49, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result = x.new_zeros(len(x), len(_SHIFTS), *_shifted(x, 0, 0).shape[-2:])
        for part, products in _parts(x, result):
            centre = _shifted(part, RADIUS, RADIUS)
            for index, (i, j) in enumerate(_SHIFTS):
                products[index] += (centre * _shifted(part, i, j)).sum(0)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result = torch.zeros_like(x)
        for (part, weights), (output, _) in zip(_parts(x, gradient), _parts(result, gradient), strict=True):
            centre, of_centre = _shifted(part, RADIUS, RADIUS), _shifted(output, RADIUS, RADIUS)
            for index, (i, j) in enumerate(_SHIFTS):
                of_centre.addcmul_(weights[index], _shifted(part, i, j))
                _shifted(output, i, j).addcmul_(weights[index], centre)
        return result


class _NeighbourSum(torch.autograd.Function):
    """Weighted sums of neighbours: (B, C, H + 6, W + 6) and weights (B, 49, H, W) to (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        result = torch.zeros_like(_shifted(x, RADIUS, RADIUS), memory_format=torch.contiguous_format)
        for (part, its_weights), (output, _) in zip(_parts(x, weights), _parts(result, weights), strict=True):
            for index, (i, j) in enumerate(_SHIFTS):
                output.addcmul_(its_weights[index], _shifted(part, i, j))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        of_x, of_weights = torch.zeros_like(x), torch.zeros_like(weights)
        parts = zip(_parts(x, weights), _parts(gradient, of_weights), _parts(of_x, weights), strict=True)
        for (part, its_weights), (its_gradient, products), (output, _) in parts:
            for index, (i, j) in enumerate(_SHIFTS):
                _shifted(output, i, j).addcmul_(its_weights[index], its_gradient)
                products[index] += (its_gradient * _shifted(part, i, j)).sum(0)
        return of_x, of_weights


def _parts(x: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few channels of one picture at a time, beside what belongs to the picture: 49 passes over what is cached."""
    for picture, its in zip(x, beside, strict=True):
        for channels in picture.split(CHANNELS_AT_ONCE):
            yield channels, its


_SHIFTS = [(i, j) for i in range(2 * RADIUS + 1) for j in range(2 * RADIUS + 1)]


def _shifted(x: Tensor, i: int, j: int) -> Tensor:
    height, width = x.shape[-2] - 2 * RADIUS, x.shape[-1] - 2 * RADIUS
    return x[..., i : i + height, j : j + width]


class _Level(Doubling):
    margin: ClassVar[int] = 4  # 2 cells of the bicubic kernel, 3 pixels of the neighbourhood

    def __init__(self, keys: int = 32) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(3, keys, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(keys, keys, 1))
        self.temperature = nn.Parameter(torch.tensor(0.0))  # its logarithm
        self.sigma = nn.Parameter(torch.tensor(1.0))  # in the units in which the neighbourhood is [-1, 1] wide

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        dtype = x.dtype
        x = F.interpolate(x.float(), scale_factor=2, mode="bicubic", align_corners=False)
        keys = _pad(self.project(guidance.to(dtype)).float())
        alike = self.temperature.float().exp().clamp(1e-4, 1e4) * _NeighbourDot.apply(keys)
        axis = torch.linspace(-1, 1, 2 * RADIUS + 1, device=x.device)
        distance = (axis[:, None] ** 2 + axis[None] ** 2).flatten()
        near = -distance / (2 * self.sigma.float() ** 2).clamp(min=1e-6)
        # The product of a softmax and a Gaussian, renormalised, is the softmax of the sum.
        weights = (alike + near[:, None, None]).softmax(1)
        return _NeighbourSum.apply(_pad(x), weights).to(dtype)  # type: ignore[no-any-return]


def _pad(x: Tensor) -> Tensor:
    """Reflected, as far as there is something to reflect; the rest repeats the edge."""
    height, width = x.shape[-2:]
    rows, columns = min(RADIUS, height - 1), min(RADIUS, width - 1)
    x = F.pad(x, (columns, columns, rows, rows), mode="reflect") if rows and columns else x
    missing = (RADIUS - columns, RADIUS - columns, RADIUS - rows, RADIUS - rows) if rows and columns else (RADIUS,) * 4
    return F.pad(x, missing, mode="replicate") if any(missing) else x


class FeatUpJBU(DoublingUpsampler):
    """FeatUp's feed-forward upsampler: 4 joint bilateral doublings, 16x, then bilinear interpolation to the size.

    Fu et al., *FeatUp*, ICLR 2024. As published: each level has its own parameters; features are doubled bicubically
    and filtered with a 7x7 kernel, a softmax of ``temperature * <key, key of the neighbour>`` times a Gaussian of
    learned width, renormalised; keys are the level's image through a 1x1 convolution to 32 channels, GELU, dropout and
    another; behind the last level ``x + 0.1 * conv1x1(dropout(x))``. Other than published: no compiled extension (the
    neighbourhoods are never unfolded), images scaled to [-0.5, 0.5] and brought to a level bilinearly with antialiasing
    instead of by adaptive average pooling, which repeats pixels where the level is finer than the output, and features
    behind loftup's channel norm.

    At C = 384 it has 0.15M parameters.
    """

    architecture: ClassVar[str] = "featup_jbu"

    def __init__(self, config: LearnedConfig | int) -> None:
        super().__init__(config)
        channels = self.config.channels
        self.levels = nn.ModuleList(_Level() for _ in range(4))
        self.fixup = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def steps(self, factor: float) -> list[Doubling]:
        """All 4 levels, whatever the factor."""
        return list(self.levels)  # type: ignore[arg-type]

    def finish(self, x: Tensor) -> Tensor:
        """The published fix-up."""
        return x + 0.1 * self.fixup(x)  # type: ignore[no-any-return]
