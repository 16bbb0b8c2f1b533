"""The universal upsampler: attention from the image and the coordinates, values that are the features themselves.

The published network projects features, so it belongs to one backbone and its output leaves the backbone's space. Here
every output vector is a convex combination of the backbone's vectors around it (the idea of joint bilateral upsampling,
Kopf et al. 2007, and of AnyUp, ICLR 2026), for any channel count. Each pixel looks at the feature cells of a window
around its own, and weighs them by

- the distance of its guidance code to the cell's, which is the mean code of the cell's pixels; cells whose pixels
  differ among themselves, because an edge runs through them, count for less;
- the distance in cells, with a bell of learned width that ends smoothly at the window's border;
- how well the cell's features agree with those that a first round of attention gives the pixel, by the cosine of
  standardised features, which knows no channel order or count.

Heads differ in all three; every pixel mixes their weights by its code. How wide a head looks, how much it trusts
agreement and how much it counts also follow from how alike neighbouring cells are on average, two numbers a picture:
features of a large receptive field are smooth, blur outlines over more cells, and want wider windows.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ops.reference import Cells
from .cells import (
    CellAxis,
    Prepared,
    Settings,
    cell_of,
    cut_axis,
    gather_cells,
    make_axis,
    window_cosines,
)
from .config import UniversalConfig
from .guidance import GuidanceEncoder, finer_image, silence
from .layers import Box, MinMaxScale, run

__all__ = ["UniversalNetwork"]

FAR = -1e9  # the score of a cell outside the grid
SHARPEST = 1e-6  # floor of the window's bell: its logarithm must stay finite
CONSTANT = 1e-6  # deviation over largest value of a channel that is constant but for rounding
LOCAL_WIDTH, LOCAL_STATISTICS = 48, 3  # of the network that looks at a cell's likeness to its window
SHORTEST_MEAN = 1e-2  # squared length of a mean direction below which agreement fades


class UniversalNetwork(nn.Module):
    """The network behind ``LoftUp.from_pretrained("any")``; see the module's text.

    Attributes:
        in_triton: whether :meth:`forward` computes the attention in a Triton kernel, on CUDA alone. Its backward pass
            computes the attention again, in PyTorch.
    """

    in_triton: bool = False

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.radius, self.depth = config.heads, config.radius, config.code_width
        rounds = 1 + self.heads  # the first round has one head
        self.scale = MinMaxScale()
        self.encoder = GuidanceEncoder(config.encoder_width, rounds * self.depth, config.quarter_width)
        self.log_width = nn.Parameter(torch.linspace(math.log(0.5), math.log(1.2), rounds))
        self.mixed = nn.Parameter(torch.zeros(rounds))
        self.agreement = nn.Parameter(torch.full((self.heads,), -0.5))
        self.gate = nn.Linear(rounds * self.depth, self.heads)
        self.adapt = nn.Linear(2, rounds + 2 * self.heads)
        self.local: nn.Sequential | None = None
        if config.local:
            looks = (2 * self.radius + 1) ** 2 + LOCAL_STATISTICS
            self.local = nn.Sequential(
                nn.Linear(looks, LOCAL_WIDTH), nn.ReLU(), nn.Linear(LOCAL_WIDTH, 2 * rounds + self.heads)
            )
            silence(self.local[2])
        with torch.no_grad():
            # At first the codes are colours, so that training starts from joint bilateral upsampling.
            nn.init.orthogonal_(self.encoder.colour.weight.view(rounds * self.depth, 3))
            self.encoder.colour.weight.mul_(3.0 * math.sqrt(rounds))
            self.encoder.fine_out.weight.mul_(0.3)
            self.encoder.coarse_out.weight.mul_(0.3)
            for layer in (self.gate, self.adapt):
                layer.weight.zero_()
                layer.bias.zero_()

    def pool(self, codes: Tensor, rows: CellAxis, columns: CellAxis) -> tuple[Tensor, Tensor]:
        """Mean codes (B, n, m, D) and mean squared length of each head's (B, n, m, 1 + heads) of the axes' cells."""
        x = gather_cells(codes, rows, columns)  # (B, n, m, P, Q, D)
        weights = rows.weights[:, None, :, None] * columns.weights[:, None, :]  # (n, m, P, Q)
        weights = weights.flatten(2)[:, :, None].to(x.dtype)  # (n, m, 1, P*Q)
        x = x.flatten(3, 4)
        squares = x.unflatten(-1, (-1, self.depth)).square().sum(-1)
        return (weights @ x)[..., 0, :], (weights @ squares)[..., 0, :]

    def assemble(
        self,
        features: Tensor,
        mean: Tensor,
        square: Tensor,
        cosines: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Prepared:
        """Keys and values of all cells, of features (B, C, h, w) and :meth:`pool`'s results for the whole grid.

        ``cosines`` is a faster :func:`loftup.ops.reference.likeness`.
        """
        values = features.movedim(1, -1).to(mean.dtype)
        length = mean.unflatten(-1, (-1, self.depth)).square().sum(-1)
        spread = (square - length).clamp(min=0)
        constant = -length - F.softplus(self.mixed) * spread
        # The result does not depend on the largest value, so that needs no gradient.
        largest = values.detach().abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        centred = (values - values.mean((1, 2), keepdim=True)) / largest
        variance = centred.square().mean((1, 2), keepdim=True)
        varies = variance > CONSTANT**2
        # Not sqrt, whose gradient at 0 is infinite.
        scaled = centred * variance.where(varies, torch.ones_like(variance)).rsqrt()
        directions = F.normalize(scaled.where(varies, torch.zeros_like(scaled)), dim=-1)
        settings = self.settings(directions)
        r = self.radius
        around = (0, 0, r, r, r, r)
        directions = F.pad(directions, around)
        own = []
        if self.local is not None:
            likeness = self.likeness((cosines or window_cosines)(directions, r))
            extra, widths = self.local(likeness).split([1 + self.heads, 1 + 2 * self.heads], -1)
            constant, own = constant + extra, [F.pad(widths, around)]
        keys = torch.cat([F.pad(mean, around), F.pad(constant, around, value=FAR), *own], -1)
        return Prepared(keys, directions, F.pad(values, around), settings)

    def likeness(self, cosines: Tensor) -> Tensor:
        """How alike each cell is to those of its window, of their cosines (B, h, w, K): (B, h, w, K + 3).

        The cosines, 0 beyond the border, less 0.4, which brings them to about 0; then their mean, least and deviation
        over the cell and the eight around it.
        """
        r, side = self.radius, 2 * self.radius + 1
        near = cosines.unflatten(-1, (side, side))[..., r - 1 : r + 2, r - 1 : r + 2].flatten(-2)
        deviation, average = torch.std_mean(near, -1, keepdim=True)
        likeness: Tensor = torch.cat([cosines - 0.4, average, near.amin(-1, keepdim=True), deviation], -1)
        return likeness

    def settings(self, directions: Tensor) -> Settings:
        """From standardised features of length 1, (B, h, w, C)."""
        alike = torch.stack([_autocorrelation(directions, step) for step in (1, 2)], -1)
        # 0.4 and 3 bring them to about 0 and 1.
        width, shares, strength = self.adapt(alike - 0.4).mul(3).split([1 + self.heads, self.heads, self.heads], -1)
        return Settings(0.5 * torch.exp(-2 * (self.log_width + width)), F.softplus(self.agreement + strength), shares)

    def tables(self, prepared: Prepared) -> list[Cells]:
        """Put what the pixels look at into tables, as the kernels take them: one set for every picture."""
        r, codes = self.radius, (1 + self.heads) * self.depth
        keys, constants, own = prepared.keys.split(
            [codes, 1 + self.heads, prepared.keys.shape[-1] - codes - 1 - self.heads], -1
        )
        h, w = (n - 2 * r for n in keys.shape[1:3])
        settings = prepared.settings
        sharpness = settings.sharpness[:, None, None].expand(-1, h, w, -1)
        strength = settings.strength[:, None, None].expand(-1, h, w, -1)
        if self.local is not None:
            widths, strengths = own[:, r : r + h, r : r + w].exp().split([1 + self.heads, self.heads], -1)
            sharpness, strength = sharpness * widths, strength * strengths
        tables = keys, constants, sharpness, strength, prepared.directions, prepared.values
        return [Cells(*each) for each in zip(*(table.contiguous() for table in tables), strict=True)]

    def mix(self, codes: Tensor, shares: Tensor) -> Tensor:
        """Shares of the heads in the pixels' weights: codes (..., D) and the picture's (heads,) to (..., heads)."""
        mixed: Tensor = (self.gate(codes) + shares).softmax(-1)
        return mixed

    def window(self, grid: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Windows of a padded grid (B, h + 2r, w + 2r, E) around cells: (B, rows, columns, K, E)."""
        side = 2 * self.radius + 1
        part = grid[:, top : bottom + side - 1, left : right + side - 1]
        return part.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 2, 4, 5, 3).flatten(3, 4)

    def attend(
        self, queries: Tensor, keys: Tensor, directions: Tensor, down: Tensor, across: Tensor, settings: Settings
    ) -> Tensor:
        """Attention weights of pixels on the cells of their windows.

        Pixels are the innermost axis. Offsets and fading, which rows and columns have each for themselves, are added as
        one sum.

        Args:
            queries: (B * n * m, P * Q, D), codes of the P by Q pixels of n by m cells.
            keys: (B * n * m, K, E), of the cells' windows, as in :class:`Prepared`.
            directions: (B * n * m, K, C), of the cells' windows.
            down: (n, P), offsets of the pixels' rows from their cell's centre in cells.
            across: (1, m, Q), of the pixels' columns; or (n, m, Q), where every row of cells has its own.
            settings: of the B pictures.

        Returns:
            (B * n * m, K, P * Q), not negative, with sum 1 over K.
        """
        depth, side, batch = self.depth, 2 * self.radius + 1, settings.strength.shape[0]
        (n, p), (_, m, q) = down.shape, across.shape
        near_down, fade_down = (x.view(n, 1, side, 1, p, 1) for x in self._axis_scores(down))
        near_across, fade_across = (x.view(-1, m, 1, side, 1, q) for x in self._axis_scores(across))
        codes = queries.shape[-1]
        constants = keys[..., codes : codes + 1 + self.heads].reshape(batch, n, m, side, side, 1, 1, -1)
        pixels = queries.mT
        sharpness = settings.sharpness[:, None, None]
        shares, strength = (  # not repeat_interleave, whose ONNX form is wrong
            x[:, None].expand(-1, n * m, -1).flatten(0, 1) for x in (settings.shares, settings.strength)
        )
        if self.local is not None:
            own = keys[:, side**2 // 2, codes + 1 + self.heads :]  # of the cell in the window's middle
            widths, strengths = own.exp().split([1 + self.heads, self.heads], -1)
            sharpness = sharpness * widths.view(batch, n, m, -1)
            strength = strength * strengths

        def scores(head: int) -> Tensor:
            part = slice(head * depth, (head + 1) * depth)
            bell = sharpness[..., head, None, None, None, None]
            constant = constants[..., head] + (bell * near_down + fade_down) + (bell * near_across + fade_across)
            summed: Tensor = constant.reshape(*keys.shape[:2], p * q)
            return summed.baddbmm_(keys[..., part], pixels[:, part], alpha=2)

        first = scores(0).softmax(1)
        agreement = (directions @ directions.mT) @ first
        inverse_length = (agreement * first).sum(1, keepdim=True).clamp(min=SHORTEST_MEAN).rsqrt()
        shares = (self.gate(queries).mT + shares[..., None]).softmax(1)
        total = torch.zeros_like(first)
        for head in range(self.heads):
            attention = scores(1 + head).addcmul_(agreement, strength[:, head, None, None] * inverse_length).softmax(1)
            total.addcmul_(attention, shares[:, head, None])
        return total

    def _axis_scores(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of one axis in the scores: (..., P) offsets to twice (..., side, P).

        A bell around the pixel, to be multiplied by its sharpness, and the logarithm of one that reaches 0 where a cell
        leaves the window.
        """
        steps = torch.arange(-self.radius, self.radius + 1, device=offsets.device, dtype=offsets.dtype)[:, None]
        offsets = offsets.unsqueeze(-2)
        near = 2 * offsets * steps - steps.square()
        share = (offsets - steps) / (self.radius + 0.5)
        return near, 2 * (1 - share.square()).clamp(min=SHARPEST).log()

    def attention(self, features: Tensor, guidance: Tensor, row: int, column: int) -> Tensor:
        """How an output pixel weighs the cells: (B, h, w), not negative, with sum 1; arguments as for :meth:`forward`.

        The output averages values, so that of one value a cell, 1 there and 0 elsewhere, is the cell's weight.
        """
        batch, _, h, w = features.shape
        each = torch.eye(h * w, device=features.device).view(1, h * w, h, w).expand(batch, -1, -1, -1)
        weights: Tensor = self(features, guidance, (row, column, row + 1, column + 1), values=each)
        return weights.view(batch, h, w)

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: that of its parameters, float32 at least, whatever autocast says."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        box: Box | None = None,
        *,
        values: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Compute the upsampled features, or a box of them; the whole image is looked at.

        Args:
            features: (B, C, h, w), any float dtype.
            guidance: (B, 3, H, W), the image at output size; or (B, 3 k^2, H, W), with k x k of its pixels for each of
                the output, as :func:`loftup.inputs.resize_guidance` gives it.
            box: (top, left, bottom, right) of the output pixels wanted; None means all.
            values: (B, E, h, w), what to average in place of the features, with the weights that these give.
            checkpointing: compute the activations again in the backward pass, to save memory before it.

        Returns:
            (B, C, bottom - top, right - left), or with E channels, in :attr:`dtype`.
        """
        if features.shape[0] == 0:  # len() would fix the batch of an export
            top, left, bottom, right = box or (0, 0, *guidance.shape[-2:])
            channels = features.shape[1] if values is None else values.shape[1]
            return features.new_empty(0, channels, bottom - top, right - left, dtype=self.dtype)
        if next(self.parameters()).dtype != self.dtype:
            state = {f"network.{name}": parameter.to(self.dtype) for name, parameter in self.named_parameters()}
            inputs = (features, guidance, box, values, checkpointing)
            return torch.func.functional_call(_Compute(self), state, inputs)  # type: ignore[no-any-return]
        return self.compute(features, guidance, box, values, checkpointing)

    def compute(
        self, features: Tensor, guidance: Tensor, box: Box | None, values: Tensor | None, checkpointing: bool
    ) -> Tensor:
        """As :meth:`forward`, in the dtype of the parameters."""
        device = features.device.type
        plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with plain:
            return self._forward(features, guidance, box, values, checkpointing)

    def _forward(
        self, features: Tensor, guidance: Tensor, box: Box | None, values: Tensor | None, checkpointing: bool
    ) -> Tensor:
        height, width = guidance.shape[-2:]
        h, w = features.shape[-2:]
        rows, columns = make_axis(height, h, features.device), make_axis(width, w, features.device)
        image, factor = finer_image(guidance)
        codes = run(checkpointing, self.encoder, self.scale(image).to(self.dtype))
        if factor > 1:
            codes = F.avg_pool2d(codes, factor)
        prepared = self.assemble(features, *self.pool(codes, rows, columns))
        if values is not None:
            r = self.radius
            prepared = replace(prepared, values=F.pad(values.movedim(1, -1).to(codes.dtype), (0, 0, r, r, r, r)))
        if self.in_triton:
            from .universal_triton import attend

            return attend(self, codes, prepared, rows, columns, box or (0, 0, height, width))
        return self.look(codes, prepared, rows, columns, (h, w), box, checkpointing)

    def look(
        self,
        codes: Tensor,
        prepared: Prepared,
        rows: CellAxis,
        columns: CellAxis,
        grid: tuple[int, int],
        box: Box | None,
        checkpointing: bool = False,
    ) -> Tensor:
        """The output's pixels, or a box of them, of all codes (B, D, H, W) and a grid of (h, w) cells."""
        h, w = grid
        if box is None:  # also told apart so that a graph for any size keeps simple sizes
            x = run(checkpointing, self.cells, codes, prepared, rows, columns, (0, h), (0, w))
            return x.index_select(2, rows.places).index_select(3, columns.places)
        # The cells that hold the box.
        (top, left, bottom, right), (height, width) = box, codes.shape[-2:]
        most = [axis.pixels.shape[1] for axis in (rows, columns)]
        first_row, last_row = (cell_of(edge, height, h) for edge in (top, bottom - 1))
        first_column, last_column = (cell_of(edge, width, w) for edge in (left, right - 1))
        down, across = (first_row, last_row + 1), (first_column, last_column + 1)
        x = run(checkpointing, self.cells, codes, prepared, rows, columns, down, across)
        x = x.index_select(2, rows.places[top:bottom] - first_row * most[0])
        return x.index_select(3, columns.places[left:right] - first_column * most[1])

    def cells(
        self,
        codes: Tensor,
        prepared: Prepared,
        rows: CellAxis,
        columns: CellAxis,
        down: tuple[int, int],
        across: tuple[int, int],
    ) -> Tensor:
        """Output of all pixels of a range of cells: (B, C, n * P, m * Q)."""
        rows, columns = cut_axis(rows, *down), cut_axis(columns, *across)
        queries = gather_cells(codes, rows, columns)  # (B, n, m, P, Q, D)
        batch, n, m, p, q, _ = queries.shape
        keys, directions, values = (
            self.window(grid, *down, *across).flatten(0, 2)
            for grid in (prepared.keys, prepared.directions, prepared.values)
        )
        offsets_down, offsets_across = (axis.offsets.to(queries.dtype) for axis in (rows, columns))
        queries = queries.reshape(batch * n * m, p * q, -1)
        weights = self.attend(queries, keys, directions, offsets_down, offsets_across[None], prepared.settings)
        x = (values.mT @ weights).view(batch, n, m, -1, p, q)
        return rearrange(x, "b n m c p q -> b c (n p) (m q)")


class _Compute(nn.Module):
    """The network's arithmetic without its hooks, which run around its own call."""

    def __init__(self, network: UniversalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Tensor:
        """See :meth:`UniversalNetwork.compute`."""
        return self.network.compute(*inputs)


def _autocorrelation(directions: Tensor, step: int) -> Tensor:
    """Mean cosine (B,) of cells a few steps apart along either axis, of (B, h, w, C); 1 where no two are."""
    total = directions.new_zeros(directions.shape[0])
    axes = directions.new_zeros(())
    for a, b in ((directions[:, step:], directions[:, :-step]), (directions[:, :, step:], directions[:, :, :-step])):
        # 0 on a grid of so few cells. A tensor and no branch, so that a graph holds for all.
        count = directions.new_ones(a.shape[1], a.shape[2]).sum()
        total = total + (a * b).sum((1, 2, 3)) / count.clamp(min=1)
        axes = axes + count.clamp(max=1)
    return (total + (1 - axes).clamp(min=0)) / axes.clamp(min=1)
