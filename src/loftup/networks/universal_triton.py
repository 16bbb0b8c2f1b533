"""The universal network's attention with gradients: forward in a Triton kernel, backward in PyTorch, bands of cells.

The kernel keeps nothing for the backward pass, so that a training step holds the codes and the result alone, and of the
attention's own tensors those of one band.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.triton_windows import windows
from .cells import CellAxis, Prepared, Settings
from .layers import Box

__all__ = ["attend"]

BAND = 1024  # cells whose attention the backward pass computes again at once


class _Look(nn.Module):
    """The network's method ``look`` as a module's forward, which ``functional_call`` can give other parameters."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: tuple[Tensor, ...], rows: CellAxis, columns: CellAxis, box: Box) -> Tensor:
        """See the class."""
        codes, keys, directions, values, *settings = tensors
        prepared = Prepared(keys, directions, values, Settings(*settings))
        return self.network.look(codes, prepared, rows, columns, box)  # type: ignore[no-any-return]


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
        for each, cells, shares, target in zip(
            pixels, network.tables(prepared), prepared.settings.shares, out, strict=True
        ):
            windows(each, network.mix(each, shares), cells, box, size, target)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs, summed over bands of cells."""
        needed = ctx.needs_input_grad[4:]
        tensors = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed, strict=True)]
        wanted = [x for x in tensors if x.requires_grad]
        sums = [torch.zeros_like(x) for x in wanted]
        look, names = _Look(ctx.network), ("network.gate.weight", "network.gate.bias")
        parameters = dict(zip(names, tensors[-2:], strict=True))
        top, left, bottom, right = ctx.box
        height, width = len(ctx.rows.places), len(ctx.columns.pixels)
        step = max(1, BAND // width * height // len(ctx.rows.pixels))
        for first in range(top, bottom, step):
            last = min(bottom, first + step)
            inputs = (tuple(tensors[:-2]), ctx.rows, ctx.columns, (first, left, last, right))
            with torch.enable_grad(), torch.autocast(gradients[0].device.type, enabled=False):
                out = torch.func.functional_call(look, parameters, inputs)
            parts = torch.autograd.grad(out, wanted, gradients[0][:, :, first - top : last - top], allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total += part
        found = iter(sums)
        return (None, None, None, None, *(next(found) if n else None for n in needed))


def attend(network: Any, codes: Tensor, prepared: Prepared, rows: CellAxis, columns: CellAxis, box: Box) -> Tensor:
    """As the network's method ``look``, in float32, on CUDA or in Triton's interpreter on a CPU."""
    settings = prepared.settings
    return _Attention.apply(  # type: ignore[no-any-return]
        network, rows, columns, box, codes, prepared.keys, prepared.directions, prepared.values,
        settings.sharpness, settings.strength, settings.shares, network.gate.weight, network.gate.bias,
    )  # fmt: skip
