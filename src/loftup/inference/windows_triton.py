"""Inference of the universal upsampler with Triton kernels: PyTorch's convolutions, then a launch a rectangle.

The stream of :mod:`loftup.inference.windows` with few, large steps: codes of as many pixels as the budget holds, their
means by cell, and one kernel for the attention, which writes the result itself.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import resize_guidance
from ..networks.guidance import finer_image
from ..networks.layers import Box
from ..networks.universal import UniversalNetwork
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
                job = _Job(self.network, features[single], guidance, averaged, canvas, memory)
            for box in job.boxes:
                with self.arithmetic():
                    write = job.writer(box)
                canvas.paint(index, box, write, self.arithmetic)  # a head is called as the caller has it


class _Job:
    """One image's codes and cells, ready for attention; ``values`` (1, E, h, w) may take the place of the features.

    Raises:
        ValueError: the budget is too small.
    """

    def __init__(
        self,
        net: UniversalNetwork,
        features: Tensor,
        guidance: Tensor,
        values: Tensor | None,
        canvas: Canvas,
        memory: int | None,
    ) -> None:
        self.net, self.size = net, canvas.size
        image, factor = finer_image(guidance)
        depth = (1 + net.heads) * net.depth
        pixel = 4 * (factor**2 * (4 * depth + net.config.encoder_width) + 2 * depth)
        if canvas.apart:
            pixel += 2 * canvas.channels * net.dtype.itemsize
        limit = budget(memory, image.device)
        tile = least_tile(net, (factor * self.size[0], factor * self.size[1]), net.dtype)
        if limit < (needed := max(tile, LEAST * pixel)):
            raise too_small(memory, limit, "piece of this network's work, a few pixels a side", needed)
        self.codes = encode(net, channels_last(net.scale(image).to(net.dtype)), limit, factor)
        self.boxes = list(_boxes(*self.size, limit // pixel))
        self.kept = _read(self.codes, self.boxes[0]) if len(self.boxes) == 1 else None
        mean, square = features.new_zeros(2, *features.shape[2:], depth, dtype=net.dtype)
        for box in self.boxes:
            pool(self._part(box), box, self.size, mean, square)
        square = square.unflatten(-1, (-1, net.depth)).sum(-1)
        prepared = net.assemble(features, mean[None], square[None], likeness)
        self.shares, self.cells = prepared.settings.shares[0], net.tables(prepared)[0]
        if values is not None:
            around = (0, 0, *[net.radius] * 4)
            self.cells = self.cells._replace(values=F.pad(values[0].movedim(0, -1).to(net.dtype), around))
        self.exact = canvas.features.dtype not in (torch.float16, torch.bfloat16)

    def _part(self, box: Box) -> Tensor:
        return _read(self.codes, box) if self.kept is None else self.kept

    def writer(self, box: Box) -> Callable[[Tensor], None]:
        """Give what writes a box of the output into (E, rows, columns), of any strides, dtype and device."""
        part = self._part(box)
        shares = self.net.mix(part, self.shares)

        def write(target: Tensor) -> None:
            out = target
            if target.device != part.device or target.dtype == torch.float64:
                out = part.new_empty(target.shape)
            windows(part, shares, self.cells, box, self.size, out, self.exact)
            if out is not target:
                target.copy_(out)

        return write


def _read(codes: Codes, box: Box) -> Tensor:
    top, left, bottom, right = box
    return codes.read(top, bottom, left, right)


def _boxes(height: int, width: int, most: int) -> Iterator[Box]:
    """The image's pixels in rectangles of at most so many."""
    for rows, columns in rectangles(height, width, most):
        yield rows.start, columns.start, min(rows.stop, height), min(columns.stop, width)
