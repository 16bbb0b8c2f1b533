"""Inference of the universal upsampler with Triton kernels: PyTorch's convolutions, then a launch a rectangle.

The stream of :mod:`loftup.inference.windows` with few, large steps: codes of as many pixels as the budget holds, their
means by cell, and one kernel for the attention, which writes the result itself.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import resize_guidance
from ..networks.guidance import finer_image
from ..networks.layers import Box
from ..ops.reference import Cells
from ..ops.triton_windows import likeness, pool, windows
from .canvas import Canvas, budget, too_small
from .codes import Codes, channels_last, encode, least_tile, rectangles
from .windows import Windows

__all__ = ["TritonWindows"]

LEAST = 256  # pixels of a rectangle that is still worth a launch


class TritonWindows(Windows):
    """See :class:`Windows`; points are computed as there."""

    def upsample(self, features: Tensor, image: Tensor, canvas: Canvas, memory: int | None) -> None:
        """See :meth:`Windows.upsample`."""
        values = canvas.values()
        for index in range(len(image)):
            single = slice(index, index + 1)
            averaged = None if values is canvas.features else values[single]
            with self.arithmetic():
                guidance = resize_guidance(image[single], canvas.size, self.network.config.oversampling)
                self._upsample(index, features[single], guidance, averaged, canvas, memory)

    def _upsample(
        self, index: int, features: Tensor, guidance: Tensor, values: Tensor | None, canvas: Canvas, memory: int | None
    ) -> None:
        """One image; ``values`` (1, E, h, w) are what is averaged in place of the features."""
        net, size = self.network, canvas.size
        image, factor = finer_image(guidance)
        depth = (1 + net.heads) * net.depth
        pixel = 4 * (factor**2 * (4 * depth + net.config.encoder_width) + 2 * depth)
        if canvas.head is not None or canvas.out is not None:  # for which the output may be made apart
            pixel += 2 * canvas.channels * net.dtype.itemsize
        limit, needed = budget(memory, image.device), least_tile(net, (factor * size[0], factor * size[1]), net.dtype)
        if limit < (needed := max(needed, LEAST * pixel)):
            raise too_small(memory, limit, "piece of this network's work, a few pixels a side", needed)
        codes = encode(net, channels_last(net.scale(image).to(net.dtype)), limit, factor)
        boxes = list(_boxes(*size, limit // pixel))
        kept = codes.read(0, size[0], 0, size[1]) if len(boxes) == 1 else None
        mean, square = features.new_zeros(2, *features.shape[2:], depth, dtype=net.dtype)
        for box in boxes:
            pool(_read(codes, box) if kept is None else kept, box, size, mean, square)
        square = square.unflatten(-1, (-1, net.depth)).sum(-1)
        prepared = net.assemble(features, mean[None], square[None], likeness)
        cells: Cells = net.tables(prepared)[0]
        if values is not None:
            r = net.radius
            cells = cells._replace(values=F.pad(values[0].movedim(0, -1).to(net.dtype), (0, 0, r, r, r, r)))
        exact = canvas.features.dtype not in (torch.float16, torch.bfloat16)
        for box in boxes:
            part = _read(codes, box) if kept is None else kept
            shares = net.mix(part, prepared.settings.shares[0])

            def write(target: Tensor, part: Tensor = part, shares: Tensor = shares, box: Box = box) -> None:
                out = target
                if target.device != part.device or target.dtype == torch.float64:
                    out = part.new_empty(target.shape)
                windows(part, shares, cells, box, size, out, exact)
                if out is not target:
                    target.copy_(out)

            canvas.paint(index, box, write, self.arithmetic)


def _read(codes: Codes, box: Box) -> Tensor:
    top, left, bottom, right = box
    return codes.read(top, bottom, left, right)


def _boxes(height: int, width: int, most: int) -> Iterator[Box]:
    """The image's pixels in rectangles of at most so many."""
    for rows, columns in rectangles(height, width, most):
        yield rows.start, columns.start, min(rows.stop, height), min(columns.stop, width)
