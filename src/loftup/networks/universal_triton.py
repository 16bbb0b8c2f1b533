"""The universal network's attention with gradients: forward in a Triton kernel, backward in PyTorch, bands of cells.

The kernel keeps nothing for the backward pass, so that a training step holds the codes, the cells' tables and the
result, and of the attention's own tensors those of one band of one picture.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import LoftUpError
from ..ops.reference import Box
from ..ops.triton_common import INTERPRETED
from ..ops.triton_windows import windows
from .cells import CellAxis, Prepared, Settings, cell_of, first_pixel

__all__ = ["attend"]

BAND = 2**16  # pixels whose attention the backward pass computes again at once


class _Look(nn.Module):
    """The network's method ``look`` as a module's forward, which ``functional_call`` can give other parameters."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: tuple[Tensor, ...], rows: CellAxis, columns: CellAxis, box: Box) -> Tensor:
        """See the class."""
        codes, keys, directions, values, *settings = tensors
        prepared = Prepared(keys, directions, values, Settings(*settings))
        grid = len(rows.pixels), len(columns.pixels)
        return self.network.look(codes, prepared, rows, columns, grid, box)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """Inputs after the box: codes, keys, directions, values, sharpness, strength, shares; the gate's parameters."""

    @staticmethod
    def forward(ctx: Any, network: Any, rows: CellAxis, columns: CellAxis, box: Box, *tensors: Tensor) -> Tensor:
        """See :func:`attend`."""
        ctx.save_for_backward(*tensors)
        ctx.network, ctx.rows, ctx.columns, ctx.box = network, rows, columns, box
        codes, keys, directions, values, *settings = tensors[:-2]
        prepared = Prepared(keys, directions, values, Settings(*settings))
        size = (codes.shape[2], codes.shape[3])
        top, left, bottom, right = box
        pixels = codes[..., top:bottom, left:right].permute(0, 2, 3, 1)
        out = values.new_empty(len(values), values.shape[-1], bottom - top, right - left)
        with torch.cuda.device_of(codes):
            for each, cells, shares, target in zip(
                pixels, network.tables(prepared), prepared.settings.shares, out, strict=True
            ):
                windows(each, network.mix(each, shares), cells, box, size, target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs, summed over pictures and bands of cells."""
        needed = ctx.needs_input_grad[4:]
        sums = [torch.zeros_like(x) if n else None for x, n in zip(ctx.saved_tensors, needed, strict=True)]
        for index in range(len(gradient)):
            one = slice(index, index + 1)
            # All but the gate's parameters have a row for each picture.
            parts = [x[one] for x in ctx.saved_tensors[:-2]] + list(ctx.saved_tensors[-2:])
            totals = [x if x is None else x[one] for x in sums[:-2]] + sums[-2:]
            tensors = [x.detach().requires_grad_(n) for x, n in zip(parts, needed, strict=True)]
            for first, last in _bands(ctx.rows, ctx.columns, ctx.box):
                part = gradient[one, :, first - ctx.box[0] : last - ctx.box[0]]
                _add(ctx, tensors, totals, (first, ctx.box[1], last, ctx.box[3]), part)
        return (None, None, None, None, *sums)


def _add(ctx: Any, tensors: list[Tensor], totals: list[Tensor | None], box: Box, gradient: Tensor) -> None:
    """Add what a band of one picture gives to the gradients of its tensors."""
    wanted = [x for x in tensors if x.requires_grad]
    parameters = dict(zip(("network.gate.weight", "network.gate.bias"), tensors[-2:], strict=True))
    inputs = (tuple(tensors[:-2]), ctx.rows, ctx.columns, box)
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        out = torch.func.functional_call(_Look(ctx.network), parameters, inputs)
    found = torch.autograd.grad(out, wanted, gradient, allow_unused=True)
    for total, part in zip([x for x in totals if x is not None], found, strict=True):
        if part is not None:
            total += part


def _bands(rows: CellAxis, columns: CellAxis, box: Box) -> Iterator[tuple[int, int]]:
    """Rows of pixels of some whole rows of cells."""
    (height, cells), (top, _, bottom, _) = (len(rows.places), len(rows.pixels)), box
    step = max(1, BAND // (rows.pixels.shape[1] * len(columns.places)))
    for cell in range(cell_of(top, height, cells), cell_of(bottom - 1, height, cells) + 1, step):
        yield (
            max(top, first_pixel(cell, height, cells)),
            min(bottom, first_pixel(min(cells, cell + step), height, cells)),
        )


def attend(network: Any, codes: Tensor, prepared: Prepared, rows: CellAxis, columns: CellAxis, box: Box) -> Tensor:
    """As the network's method ``look``, in float32, on CUDA or in Triton's interpreter on a CPU."""
    if codes.dtype != torch.float32 or not (codes.is_cuda or INTERPRETED.value):
        raise LoftUpError(
            f"in_triton is for float32 on CUDA, this network computes in {codes.dtype} on {codes.device.type}; set "
            "in_triton = False"
        )
    settings = prepared.settings
    return _Attention.apply(  # type: ignore[no-any-return]
        network, rows, columns, box, codes, prepared.keys, prepared.directions, prepared.values,
        settings.sharpness, settings.strength, settings.shares, network.gate.weight, network.gate.bias,
    )  # fmt: skip
